"""The tokens of a tokenizer, with the text and the bytes of each, and the decoding of ids.

The bytes come from the vocabulary, since a part of a character is decoded as U+FFFD.
"""

import json
import logging
import re
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

from transformers import TokenizersBackend

from loaders.tokenizer_faults import is_tokenizer_fault
from server.errors import GenerationFailed

_log = logging.getLogger(__name__)
_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # SentencePiece's tokens for single bytes


class VocabularyToken(NamedTuple):
    """One token of the vocabulary.

    Args:
        id: its index there.
        text: its text after another token; a special token's name; U+FFFD for part of a character.
        data: the UTF-8 bytes that it adds, possibly part of a character; empty if it is hidden.
        special: it is a control token, not text.
        hidden: decoding skips it: it is special, or unknown to the tokenizer.
        partial: its bytes alone are not valid UTF-8.
        fallback: a byte-fallback token: one byte of a character.
        waits: its text depends on the next token: it is a fallback token, or a marked beginning of a word.
    """

    id: int
    text: str
    data: bytes
    special: bool = False
    hidden: bool = False
    partial: bool = False
    fallback: bool = False
    waits: bool = False


class Vocabulary(dict[int, VocabularyToken]):
    """The tokens of a ``transformers`` tokenizer by id, each computed on first access.

    Every id has an entry: one that is unknown to the tokenizer is hidden and has no text.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._decode = _decoder(tokenizer)
        self._special = _special(tokenizer)
        self._byte_level = _BYTES if "ByteLevel" in _decoder_types(tokenizer) else None
        self._anchor = self._find_anchor()

    @property
    def special_names(self) -> list[str]:
        """The names of all special tokens."""
        return list(self._special.values())

    def decode(self, ids: list[int]) -> str:
        """Ids → text without special tokens, before ``clean_up_tokenization``.

        Raises:
            GenerationFailed: the tokenizer fails on them.
        """
        try:
            return self._decode(ids)
        except BaseException as error:
            if not is_tokenizer_fault(error):
                raise
            _log.warning("the tokenizer failed to decode tokens (%s)", type(error).__name__)
            raise GenerationFailed("the model's tokenizer fails to decode these tokens") from None

    def __missing__(self, id_: int) -> VocabularyToken:
        found = self[id_] = self._look_up(id_)
        return found

    def _look_up(self, id_: int) -> VocabularyToken:
        if id_ in self._special:
            return VocabularyToken(id_, self._special[id_], b"", special=True, hidden=True)
        if (piece := self._piece(id_)) is None:
            return VocabularyToken(id_, "", b"", hidden=True)
        if (byte := _FALLBACK.fullmatch(piece)) and self.decode([id_]) != piece:
            data = bytes.fromhex(byte[1])
            return _of_bytes(id_, data)._replace(fallback=True, waits=True)
        if self._byte_level is not None:
            return _of_bytes(id_, _byte_level(piece, self._byte_level))
        text, waits = self._continuing(id_)
        return VocabularyToken(id_, text, text.encode(), waits=waits)

    def _piece(self, id_: int) -> str | None:
        """The token's string in the vocabulary; None if the tokenizer doesn't know the id."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None and id_ >= len(self._tokenizer):
            return None
        look_up = self._tokenizer.convert_ids_to_tokens if backend is None else backend.id_to_token
        found: str | None = look_up(id_)
        return found

    def _continuing(self, id_: int) -> tuple[str, bool]:
        """The token's text after another token, since many decoders strip the space before the first one;
        and whether the next token changes it."""
        before = self.decode(self._anchor)
        last = self.decode([*self._anchor, id_])
        if not last.startswith(before):
            return self.decode([id_]), False
        followed = self.decode([*self._anchor, id_, *self._anchor])
        if followed.startswith(last):
            return last[len(before) :], False
        return followed[len(before) : len(followed) - len(before.lstrip())], True

    def _find_anchor(self) -> list[int]:
        """A token that is a word, as a list; empty if there is none."""
        try:
            ids: list[int] = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        except BaseException as error:
            if not is_tokenizer_fault(error):
                raise
            return []
        return [id_ for id_ in ids if id_ not in self._special][-1:]


def cleans_up(tokenizer: Any) -> bool:
    """Whether its ``decode`` applies ``clean_up_tokenization``, which deletes spaces before punctuation."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    model = type(getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)).__name__
    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    return model != "BPE" or bool(getattr(tokenizer, forced, False))


def _decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """``tokenizer.decode``, or the backend's ``decode`` where ``transformers`` only adds the clean-up to it:
    called twice for every token of a stream, the checks of ``transformers`` cost more than the decoding."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and type(tokenizer)._decode is TokenizersBackend._decode:
        return partial(backend.decode, skip_special_tokens=True)
    return partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _special(tokenizer: Any) -> dict[int, str]:
    """Names of the tokens that decoding skips: those with a role, and all that are declared special."""
    named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    try:
        added = tokenizer.added_tokens_decoder
    except (AttributeError, NotImplementedError):  # some tokenizers lack it
        added = {}
    return {**named, **{id_: token.content for id_, token in added.items() if token.special}}


def _decoder_types(tokenizer: Any) -> set[str]:
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return set()
    state = json.loads(decoder.__getstate__())
    return {state["type"], *(part["type"] for part in state.get("decoders", []))}


def _alphabet() -> dict[str, int]:
    """Byte-level BPE's character → its byte: itself if printable, else one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    moved = ((chr(0x100 + at), byte) for at, byte in enumerate(others))
    return dict(chain(((chr(byte), byte) for byte in printable), moved))


_BYTES = _alphabet()


def _byte_level(piece: str, alphabet: Mapping[str, int]) -> bytes:
    try:
        return bytes(alphabet[character] for character in piece)
    except KeyError:  # an added token, which is in the vocabulary as plain text
        return piece.encode()


def _of_bytes(id_: int, data: bytes) -> VocabularyToken:
    try:
        return VocabularyToken(id_, data.decode(), data)
    except UnicodeDecodeError:
        return VocabularyToken(id_, data.decode(errors="replace"), data, partial=True)
