"""``scripts/gpu_check``: checks results and speed on a GPU; docs/gpu.md describes it.

Only the part that measures a server needs more packages than the loaders.
"""
