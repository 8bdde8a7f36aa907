"""Measuring over HTTP: a light client, and the loads that it makes."""
