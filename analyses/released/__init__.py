"""Analyses of released numbers: mean activations, trained vectors, judged answers, question files."""
