"""Measuring: every precision through its engine, over HTTP, and beside the engines users would pick instead.

docs/benchmarks.md explains what is measured, how, and how to read it.
"""
