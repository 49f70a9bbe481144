"""What analyses are computed from: live models with their finetunes, pocket or from the hub.

- `finetunes`: a chat model and its finetunes; `pocket`, `hub`: where they are from; `asked`: those
  of `hub` with a judge; `checkpoints`: their training runs
- `arms`: tables of experiments of many finetunes
"""
