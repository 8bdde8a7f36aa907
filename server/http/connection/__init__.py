"""Connections at bounded cost: accepting, parsing, refusing and ending them."""
