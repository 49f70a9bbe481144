"""One file a figure: `compute(suite) -> tables` and `plot(tables) -> figures`. `suites/*.toml` say which run.

They are filed by what they need:

- `released`: numbers that were released; `runs`: checkpoints of training runs; `finetunes`: live models to ask;
  `general_vs_narrow`: losses of their solutions; `causes`: experiments of many finetunes
- `suite`: which analyses of which input, and suite files of your own; `inputs`: gives that
- `run`: makes them; `tasks`: over processes, with `progress`; `plan`: what that will take
- `findings`: what they found, as sentences; `story`: the chapters that a report opens with; `report`: shows it
- `comparison`: published numbers beside ours, from `published_numbers.toml`
- `benchmarks`: speed, and how intervals cover

.. include:: README.md
"""
