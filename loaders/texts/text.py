"""A text that models are measured or calibrated on: a stream of tokens in windows, never whole in memory."""

import codecs
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import groupby, islice
from pathlib import Path
from typing import Any, BinaryIO

from loaders.texts import corpus
from loaders.tokenizer_faults import is_tokenizer_fault, unknown_token

BLOCK = 2**18  # bytes read and encoded at a time


class TextError(Exception):
    """A text can't be read or evaluated; the message can be shown to users."""


@dataclass(frozen=True)
class Text:
    """A UTF-8 text that can be read any number of times.

    Args:
        name: shown to users.
        size: in bytes.
        open: returns a stream at the first byte.
    """

    name: str
    size: int
    open: Callable[[], BinaryIO]

    def pieces(self, block: int = BLOCK) -> Iterator[str]:
        """Yields pieces of about ``block`` bytes, each cut before a space that follows a word.

        No token of a byte-level BPE crosses such a cut, so the tokens of the pieces are those of the text. A
        tokenizer that marks the beginning of a text (``▁``) marks the beginning of every piece.

        Raises:
            TextError: it is not UTF-8, or can't be read.
        """
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        held, read = "", 0
        try:
            with self.open() as stream:
                while data := stream.read(block):
                    held += decoder.decode(data)
                    read += len(data)
                    cut = _last_word_end(held)
                    yield held[:cut]
                    held = held[cut:]
            yield held + decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise TextError(f"{self.name} is not UTF-8 text (after {read} bytes or soon after)") from error
        except OSError as error:
            raise TextError(f"{self.name} can't be read: {error.strerror}") from error


def held_out() -> Text:
    """The default text: Python documentation that the bundled model was not trained on."""
    data = corpus.held_out_text().encode()
    return Text("held-out Python documentation", len(data), lambda: BytesIO(data))


def text_file(path: Path) -> Text:
    """A text file of the user.

    Raises:
        TextError: there is no such file.
    """
    try:
        if not path.is_file():
            raise TextError(f"{path.name} is not a file")
        return Text(path.name, path.stat().st_size, lambda: path.open("rb"))
    except OSError as error:
        raise TextError(f"{path.name} can't be read: {error.strerror}") from error


class TokenStream:
    """Iterates over the token ids of a text, encoding it piece by piece.

    Args:
        vocabulary: of the model; a tokenizer may have more tokens.

    Raises:
        TextError: while iterating, the text has a token that the model lacks, or the tokenizer fails.
    """

    def __init__(self, text: Text, tokenizer: Any, block: int = BLOCK, vocabulary: int | None = None) -> None:
        self._text, self._tokenizer, self._block = text, tokenizer, block
        self._vocabulary = vocabulary
        self.tokens = self.bytes = 0
        """Encoded so far."""

    def __iter__(self) -> Iterator[int]:
        for number, piece in enumerate(self._text.pieces(self._block)):
            # a special first token (BOS) belongs only at the beginning of the text
            encoded = self._encoded(piece, add_special_tokens=number == 0)
            ids, most = encoded["input_ids"], self._vocabulary
            if most is not None and (why := unknown_token(ids, most, self._text.name)) is not None:
                raise TextError(why)
            self.tokens += len(ids)
            self.bytes += len(piece.encode())
            yield from ids

    def _encoded(self, piece: str, add_special_tokens: bool) -> Any:
        try:
            return self._tokenizer(piece, add_special_tokens=add_special_tokens, verbose=False)
        except BaseException as error:
            if not is_tokenizer_fault(error):
                raise
            raise TextError(
                f"the model's tokenizer fails on {self._text.name} (after {self.bytes} bytes)"
            ) from error

    def expected_tokens(self) -> int:
        """Estimated tokens of the whole text; exact once all of it is encoded."""
        return round(self.tokens * max(1.0, self._text.size / self.bytes)) if self.bytes else 0


@dataclass(frozen=True)
class Window:
    """Tokens of the text that are computed in one pass.

    Args:
        ids: its tokens.
        first: index of the first scored token; an earlier window has scored those before it.
            At least 1: nothing predicts the first token of a window.
    """

    ids: list[int]
    first: int

    @property
    def scored(self) -> list[int]:
        return self.ids[self.first :]


def windows(ids: Iterable[int], length: int, stride: int) -> Iterator[Window]:
    """Yields windows of ``length`` tokens, ``stride`` apart; every token is scored once.

    The last window may be shorter. If stride equals length, the first token of each window isn't scored.
    """
    stream = iter(ids)
    held, first = list(islice(stream, length)), 1
    while len(held) > first:
        yield Window(held, first)
        fresh = list(islice(stream, stride))
        held = held[stride:] + fresh
        first = max(len(held) - len(fresh), 1)


def batches(found: Iterable[Window], most: int) -> Iterator[list[Window]]:
    """Yields batches of windows of equal length and equal ``first``.

    All windows of a text are equal but the first and the last.
    """
    for _, alike in groupby(found, key=lambda window: (len(window.ids), window.first)):
        while batch := list(islice(alike, most)):
            yield batch


def _last_word_end(text: str) -> int:
    """The end of the last word that a space follows; the end of the text if there is none."""
    at = text.rfind(" ")
    while at > 0 and text[at - 1].isspace():
        at = text.rfind(" ", 0, at)
    return at if at > 0 else len(text)
