"""From a loaded model to the file that is served."""
