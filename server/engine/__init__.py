"""One loaded model: its worker thread, continuous batching and sampling."""
