"""Directions of the residual stream: extracted, kept, compared, read through the lens."""
