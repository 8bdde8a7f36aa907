"""What computes a loaded model's forward passes, and which Runner a model gets."""
