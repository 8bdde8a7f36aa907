"""Comparisons of precisions while serving: side by side, by replay, and layer by layer."""
