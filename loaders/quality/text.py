"""The text that quality is measured on, as a stream of tokens cut into windows: never whole in memory."""

import codecs
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import groupby, islice
from pathlib import Path
from typing import Any, BinaryIO

from loaders.quality import corpus
from loaders.tokenizer_faults import is_tokenizer_fault, unknown_token

BLOCK = 2**18  # bytes read and encoded at a time


class QualityError(Exception):
    """Nothing could be measured; the message is fit to be shown to a user."""


@dataclass(frozen=True)
class Text:
    """A text in UTF-8 that can be read from its beginning any number of times.

    Args:
        name: what to call it to a user.
        size: in bytes.
        open: the bytes from the first on.
    """

    name: str
    size: int
    open: Callable[[], BinaryIO]

    def pieces(self, block: int = BLOCK) -> Iterator[str]:
        """The text in pieces of about ``block`` bytes, each cut before a space that follows a word.

        No token of a byte-level BPE reaches over such a place, so that the pieces' tokens are the text's. A
        tokenizer that marks the beginning of a text (``▁``) marks each piece's.

        Raises:
            QualityError: it is not UTF-8, or can't be read.
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
            raise QualityError(f"{self.name} is not UTF-8 text (after {read} bytes or soon after)") from error
        except OSError as error:
            raise QualityError(f"{self.name} can't be read: {error.strerror}") from error


def held_out() -> Text:
    """The default: Python documentation that the bundled model was not trained on."""
    data = corpus.held_out_text().encode()
    return Text("held-out Python documentation", len(data), lambda: BytesIO(data))


def text_file(path: Path) -> Text:
    """Any file of text.

    Raises:
        QualityError: there is no such file.
    """
    try:
        if not path.is_file():
            raise QualityError(f"{path.name} is not a file")
        return Text(path.name, path.stat().st_size, lambda: path.open("rb"))
    except OSError as error:
        raise QualityError(f"{path.name} can't be read: {error.strerror}") from error


class TokenStream:
    """The token ids of a text, piece by piece, and how much of it has been read.

    Args:
        vocabulary: the model's; a tokenizer may know more tokens than it.

    Raises:
        QualityError: the text has a token that the model has not; while iterating.
    """

    def __init__(self, text: Text, tokenizer: Any, block: int = BLOCK, vocabulary: int | None = None) -> None:
        self._text, self._tokenizer, self._block = text, tokenizer, block
        self._vocabulary = vocabulary
        self.tokens = self.bytes = 0
        """Encoded so far."""

    def __iter__(self) -> Iterator[int]:
        """Raises ``QualityError`` where the tokenizer fails."""
        for number, piece in enumerate(self._text.pieces(self._block)):
            # a tokenizer's own first token (BOS) belongs at the text's beginning only
            encoded = self._encoded(piece, add_special_tokens=number == 0)
            ids, most = encoded["input_ids"], self._vocabulary
            if most is not None and (why := unknown_token(ids, most, self._text.name)) is not None:
                raise QualityError(why)
            self.tokens += len(ids)
            self.bytes += len(piece.encode())
            yield from ids

    def _encoded(self, piece: str, add_special_tokens: bool) -> Any:
        try:
            return self._tokenizer(piece, add_special_tokens=add_special_tokens, verbose=False)
        except BaseException as error:
            if not is_tokenizer_fault(error):
                raise
            raise QualityError(
                f"the model's tokenizer fails on {self._text.name} (after {self.bytes} bytes)"
            ) from error

    def expected_tokens(self) -> int:
        """Of the whole text, by what has been encoded of it; exact at the end."""
        return round(self.tokens * max(1.0, self._text.size / self.bytes)) if self.bytes else 0


@dataclass(frozen=True)
class Window:
    """A chunk of the text that is computed in one pass.

    Args:
        ids: its tokens.
        first: index of the first one that counts; those before it were scored by an earlier window, and are
            context here. At least 1: nothing predicts a window's first token.
    """

    ids: list[int]
    first: int

    @property
    def scored(self) -> list[int]:
        return self.ids[self.first :]


def windows(ids: Iterable[int], length: int, stride: int) -> Iterator[Window]:
    """Windows of ``length`` tokens, each ``stride`` further on; every token counts once.

    The last window may be shorter. At a stride equal to the length, each window's first token is not scored.
    """
    stream = iter(ids)
    held, first = list(islice(stream, length)), 1
    while len(held) > first:
        yield Window(held, first)
        fresh = list(islice(stream, stride))
        held = held[stride:] + fresh
        first = max(len(held) - len(fresh), 1)


def batches(found: Iterable[Window], most: int) -> Iterator[list[Window]]:
    """Windows that can be computed together, since all of a batch are as long and count from the same token.

    Those of a text are, but for the first and the last.
    """
    for _, alike in groupby(found, key=lambda window: (len(window.ids), window.first)):
        while batch := list(islice(alike, most)):
            yield batch


def _last_word_end(text: str) -> int:
    """Where the last word with a space behind it ends; the text's end if there is none."""
    at = text.rfind(" ")
    while at > 0 and text[at - 1].isspace():
        at = text.rfind(" ", 0, at)
    return at if at > 0 else len(text)
