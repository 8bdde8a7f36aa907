"""The error of a measurement of quality."""

from loaders.texts import TextError


class QualityError(TextError):
    """The measurement failed; the message can be shown to users."""
