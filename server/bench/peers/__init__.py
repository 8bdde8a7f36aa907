"""Other engines, measured on the same weights, from an environment of their own."""
