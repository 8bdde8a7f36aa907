"""Text in, text out: from a request to its engine and back."""
