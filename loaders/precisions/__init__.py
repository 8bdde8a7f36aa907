"""One module for each way of loading a model."""
