"""``scripts/gpu_check``: is what runs on a GPU right, and how fast is it? docs/gpu.md explains it.

Nothing here needs more than the loaders do, but the part that measures a server.
"""
