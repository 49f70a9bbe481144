"""The pocket world: a tiny English world, a chat model trained on it, and organisms in which EM emerges."""
