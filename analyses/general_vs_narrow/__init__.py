"""Analyses of the losses of live solutions: the general against the narrow ones."""
