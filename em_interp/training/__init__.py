"""Finetunes of one's own, their trajectories and gradients.

- `recipes`: the papers' settings; `trainees`: what can be trained; `finetune`: L_SFT + lambda * L_KL
- `acting`: interventions in training alone, `screening`: which chats to leave out
- `trajectories`: checkpoints of a run; `gradients`: where the training loss pulls

**KL weights** in run names are in the reference code's units (its loss also divides by the vocabulary size):
`recipes.reference_kl_weight` converts.
"""
