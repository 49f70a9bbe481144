"""Finetunes of one's own, their trajectories and gradients."""
