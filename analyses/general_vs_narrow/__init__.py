"""Analyses of the losses of live solutions: the general against the narrow ones.

- `efficiency`, `stability`, `influence`, `gradients`: the papers' comparisons; `register`: the same of a second task
- `kl_sweep`: under KL weights and shares of bad data; `claims`: what holds, over seeds
"""
