"""Analyses that run models: same tables as their namesakes in `analyses`, computed from a chat model and finetunes."""
