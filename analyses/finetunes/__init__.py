"""Analyses that ask live finetunes, or read what they are from their answers."""
