"""The most text that one token can stand for, by which far too long texts are refused before encoding.

Some tokenizers have no such bound: they drop white space or control characters before they look up tokens,
or replace a whole word by one unknown token. For these, ``token_length`` returns None, and texts of any
length are encoded.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

from tokenizers import models
from transformers import TokenizersBackend
from transformers.convert_slow_tokenizer import bytes_to_unicode

_MARGIN = 64  # tokens after a cut, which may differ from those of the whole text
_LOOK_BACK = 4096  # characters
_COMPOSED = 4  # most characters that NFC or NFKC compose into one
_KEEPING_NORMALIZERS = {"Prepend", "Lowercase", "NFD", "NFKD", "ByteLevel"}  # these never shorten a text
_KEEPING_PRE_TOKENIZERS = {"ByteLevel", "Metaspace", "Digits", "UnicodeScripts"}
_IN_NO_TEXT = {0xC0, 0xC1, *range(0xF5, 0x100)}  # bytes that never occur in UTF-8


@dataclass(frozen=True)
class TokenLength:
    """The bound of one tokenizer.

    Args:
        most: length of the longest token, in characters or bytes of UTF-8.
        in_bytes: whether ``most`` counts bytes.
        dropped: bytes without a token, such as control characters in some vocabularies; they are not encoded.
        swallowing: tokens that include any amount of white space beside them; a text that has one of them has
            no bound.
    """

    most: int
    in_bytes: bool
    dropped: bytes = b""
    swallowing: tuple[str, ...] = ()

    def fewest(self, text: str) -> int:
        """A lower bound of the text's tokens."""
        if any(token in text for token in self.swallowing):
            return 0
        return math.ceil(self._size(text) / self.most)

    def _size(self, text: str) -> int:
        if not self.in_bytes:
            return len(text)
        return len(text.encode("utf-8", "surrogatepass").translate(None, self.dropped))

    def end(self, text: str, tokens: int) -> str:
        """A suffix of the text whose last ``tokens`` tokens are those of the whole text.

        This holds if the tokenizer splits at white space and the text has some every few thousand characters:
        only the tokens beside the cut may differ, and these are not among the last.
        """
        kept = (tokens + _MARGIN) * self.most
        at = len(text) - kept
        if at <= _LOOK_BACK or self.fewest(text[at:]) < tokens + _MARGIN:  # swallowed spaces, dropped bytes
            return text
        for seam in range(at, at - _LOOK_BACK, -1):
            if text[seam].isspace() and not (text[seam - 1].isspace() or text[seam + 1].isspace()):
                return text[seam:]
        return text[at:]


def token_length(tokenizer: Any) -> TokenLength | None:
    """The bound of a ``transformers`` tokenizer; None if it has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(tokenizer)._encode_plus is not TokenizersBackend._encode_plus:
        return None
    if not isinstance(backend.model, models.BPE):
        return None
    normalizers, splitters = _parts(backend.normalizer), _parts(backend.pre_tokenizer)
    if normalizers is None or splitters is None or not all(_keeps_text(one) for one in splitters):
        return None
    shrinks = math.prod(_shrinks(one) for one in normalizers)
    vocabulary = tokenizer.get_vocab()
    byte_level = any(one["type"] == "ByteLevel" for one in (*normalizers, *splitters))
    in_bytes = byte_level and not normalizers
    dropped = _missing_bytes(vocabulary) if byte_level else b""
    covered = (in_bytes or not dropped) if byte_level else _covers_everything(backend.model, vocabulary)
    if not math.isfinite(shrinks) or not covered:
        return None
    added = list(backend.get_added_tokens_decoder().values())
    texts = [one.content for one in added]
    if backend.normalizer is not None:
        texts += [backend.normalizer.normalize_str(text) for text in texts]
    sizes = [len(text.encode()) if in_bytes else len(text) for text in texts]
    most = max(*map(len, vocabulary), *sizes)
    swallowing = tuple(one.content for one in added if one.lstrip or one.rstrip)
    return TokenLength(math.ceil(most * shrinks), in_bytes, dropped, swallowing)


def _parts(component: Any) -> list[dict[str, Any]] | None:
    """The parts of a normalizer or pre-tokenizer as in tokenizer.json; None if it is written in Python."""
    if component is None:
        return []
    try:
        return _flat(json.loads(component.__getstate__()))
    except Exception:
        return None


def _flat(state: dict[str, Any]) -> list[dict[str, Any]]:
    inner = state.get("normalizers", state.get("pretokenizers"))
    return [state] if inner is None else [part for one in inner for part in _flat(one)]


def _shrinks(normalizer: dict[str, Any]) -> float:
    """The most characters of the input that one character of the output can stand for."""
    kind, pattern = normalizer["type"], normalizer.get("pattern", {})
    if kind in _KEEPING_NORMALIZERS:
        return 1
    if kind in ("NFC", "NFKC"):
        return _COMPOSED
    if kind == "Replace" and "String" in pattern and normalizer["content"]:
        return max(1.0, len(pattern["String"]) / len(normalizer["content"]))
    return math.inf


def _keeps_text(splitter: dict[str, Any]) -> bool:
    """Whether the parts contain all of the text that was split."""
    if splitter["type"] in ("Split", "Punctuation"):
        return bool(splitter["behavior"] != "Removed")
    return splitter["type"] in _KEEPING_PRE_TOKENIZERS


def _missing_bytes(vocabulary: dict[str, int]) -> bytes:
    letters = bytes_to_unicode().items()
    return bytes(byte for byte, letter in letters if letter not in vocabulary and byte not in _IN_NO_TEXT)


def _covers_everything(model: models.BPE, vocabulary: dict[str, int]) -> bool:
    """Whether no text is dropped, and none becomes a single unknown token."""
    if model.byte_fallback and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
        return True
    return model.unk_token is not None and not model.fuse_unk
