"""Measures the steps of a report. Imports ``server.bench``, unlike everything that serves."""
