"""Benchmarks of every precision: through its engine, over HTTP, and against alternative engines.

docs/benchmarks.md describes the measurements.
"""
