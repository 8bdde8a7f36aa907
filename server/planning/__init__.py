"""Capacity planning: measured step times, a formula for the steady state, and a simulation of the real scheduler."""
