"""Asking models questions and scoring what they answer."""
