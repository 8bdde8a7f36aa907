"""How a measurement fails."""


class BenchError(Exception):
    """It can't be made; the message says why and is fit to be shown."""
