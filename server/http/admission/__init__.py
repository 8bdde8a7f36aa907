"""Whether a request may take a place, decided before it is read."""
