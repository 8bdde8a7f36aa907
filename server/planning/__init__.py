"""Capacity planning: step times, formulas of the steady state, simulation of the real scheduler."""
