"""Conversations as text, by the model's chat template."""
