"""The error of a measurement."""


class BenchError(Exception):
    """A measurement failed; the message gives the reason and can be shown to users."""
