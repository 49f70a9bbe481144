"""Analyses of the checkpoints of training runs, released or made here."""
