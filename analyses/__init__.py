"""One file a figure: `compute(suite) -> tables` and `plot(tables) -> figures`. `suites/*.toml` say which run.

They are filed by what they need: `released` numbers, checkpoints of training `runs`, live `finetunes` to ask, or the
losses of their solutions (`general_vs_narrow`). `inputs` gives that, `run` makes it, `report` shows it.
"""
