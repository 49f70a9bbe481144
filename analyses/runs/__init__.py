"""Analyses of the checkpoints of training runs, released or made here.

- `pca`, `trajectory`, `local_cosine`: their way; `kl_removal`: where they go without the penalty
- `training_log`: loss and gradient norm
"""
