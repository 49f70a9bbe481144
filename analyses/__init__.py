"""One file a figure: ``compute(suite) -> tables`` and ``plot(tables) -> figures``. ``suites/*.toml`` say which run."""
