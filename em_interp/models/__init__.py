"""Chat models: families, hooks, conversations as tokens, adapters, and the passes that everything here is made of."""
