"""Analyses of released numbers: mean activations, trained vectors, judged answers, question files.

- `mean_diff`, `cosines`, `layer_convention`, `trained_vectors`: directions
- `em_rates`, `steering`, `ablation`, `thresholds`, `wordings`: judged answers
- `question_sets`: what was asked
"""
