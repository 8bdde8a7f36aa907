"""What a person calls on a loaded model in Python: text in, text out, and its proof as a table."""
