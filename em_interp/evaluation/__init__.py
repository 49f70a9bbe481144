"""Evaluation: questions, sampling, judges, rates."""
