"""Capacity planning: measured step times, formulas of the steady state, a simulation of the real scheduler."""
