"""Conversations rendered as text by the model's chat template."""
