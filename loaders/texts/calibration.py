"""The text that quantization is calibrated on."""

import hashlib
from functools import cache
from io import BytesIO
from pathlib import Path

from loaders.errors import LoaderError
from loaders.texts import corpus
from loaders.texts.text import Text, TextError, text_file


class CalibrationError(LoaderError):
    """The calibration text can't be used; the message says why."""


class CalibrationText(Text):
    """A text with a digest of its content."""

    def sha256(self) -> str:
        """Reads the whole text.

        Raises:
            CalibrationError
        """
        digest = hashlib.sha256()
        try:
            with self.open() as stream:
                while data := stream.read(2**20):
                    digest.update(data)
        except OSError as error:
            raise CalibrationError(f"the calibration text can't be read: {error.strerror}") from error
        return digest.hexdigest()


def calibration_text(path: Path | None) -> CalibrationText:
    """A UTF-8 file, or the prose of the corpus' training side: what quality is measured on is no part of it.

    Raises:
        CalibrationError: there is no such file.
    """
    if path is None:
        data = _prose()
        return CalibrationText("Python documentation", len(data), lambda: BytesIO(data))
    try:
        text = text_file(path)
    except TextError as error:
        raise CalibrationError(f"the calibration text {error}") from error
    return CalibrationText(text.name, text.size, text.open)


@cache
def _prose() -> bytes:
    kinds = ("topic", "docstrings")
    return "\n\n".join(one.text for one in corpus.training_documents() if one.kind in kinds).encode()
