"""One module per way of loading a model."""
