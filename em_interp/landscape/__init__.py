"""The loss around solutions: efficiency, stability, curvature, influence on pre-training text."""
