"""The support matrix: every cell equals a slow obvious oracle, or is refused with a remedy."""
