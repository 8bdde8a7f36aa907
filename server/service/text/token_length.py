"""How much text one token can stand for at most: by it a far too long text is refused before it is encoded.

Only where that is certain. A tokenizer may shrink a text without bound before it looks up any token: drop
white space or control characters, or put one unknown token in the place of a whole word. Of such a one
nothing is said; its texts are encoded whatever their length.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

from tokenizers import models
from transformers import TokenizersBackend
from transformers.convert_slow_tokenizer import bytes_to_unicode

_MARGIN = 64  # tokens at the begin of a text's end, which may be others than in the whole text
_LOOK_BACK = 4096  # characters
_COMPOSED = 4  # characters that one composed by NFC or NFKC stands for, at most
_KEEPING_NORMALIZERS = {"Prepend", "Lowercase", "NFD", "NFKD", "ByteLevel"}  # no fewer characters than before
_KEEPING_PRE_TOKENIZERS = {"ByteLevel", "Metaspace", "Digits", "UnicodeScripts"}
_IN_NO_TEXT = {0xC0, 0xC1, *range(0xF5, 0x100)}  # bytes that UTF-8 doesn't use


@dataclass(frozen=True)
class TokenLength:
    """Of one tokenizer.

    Args:
        most: characters, or bytes of UTF-8, of the longest token.
        in_bytes: whether it is bytes.
        dropped: bytes that the vocabulary lacks, as some do of control characters, and that leave no token.
        swallowing: tokens that take along the white space beside them, however much; nothing is known of a
            text that has one of them.
    """

    most: int
    in_bytes: bool
    dropped: bytes = b""
    swallowing: tuple[str, ...] = ()

    def fewest(self, text: str) -> int:
        """Tokens that the text has at least."""
        if any(token in text for token in self.swallowing):
            return 0
        return math.ceil(self._size(text) / self.most)

    def _size(self, text: str) -> int:
        if not self.in_bytes:
            return len(text)
        return len(text.encode("utf-8", "surrogatepass").translate(None, self.dropped))

    def end(self, text: str, tokens: int) -> str:
        """An end of the text whose last tokens, so many, are those of the whole text.

        That holds wherever the tokenizer splits a text at white space and none is longer than some thousand
        characters without any: the tokens at the seam may differ, and are not among the last.
        """
        kept = (tokens + _MARGIN) * self.most
        at = len(text) - kept
        if at <= _LOOK_BACK or self.fewest(text[at:]) < tokens + _MARGIN:  # spaces swallowed, bytes dropped
            return text
        for seam in range(at, at - _LOOK_BACK, -1):
            if text[seam].isspace() and not (text[seam - 1].isspace() or text[seam + 1].isspace()):
                return text[seam:]
        return text[at:]


def token_length(tokenizer: Any) -> TokenLength | None:
    """Of a ``transformers`` tokenizer; None where its tokens have no certain length."""
    beneath = getattr(tokenizer, "backend_tokenizer", None)
    if beneath is None or type(tokenizer)._encode_plus is not TokenizersBackend._encode_plus:
        return None
    if not isinstance(beneath.model, models.BPE):
        return None
    normalizers, splitters = _parts(beneath.normalizer), _parts(beneath.pre_tokenizer)
    if normalizers is None or splitters is None or not all(_keeps_text(one) for one in splitters):
        return None
    shrinks = math.prod(_shrinks(one) for one in normalizers)
    vocabulary = tokenizer.get_vocab()
    byte_level = any(one["type"] == "ByteLevel" for one in (*normalizers, *splitters))
    in_bytes = byte_level and not normalizers
    dropped = _missing_bytes(vocabulary) if byte_level else b""
    covered = (in_bytes or not dropped) if byte_level else _covers_everything(beneath.model, vocabulary)
    if not math.isfinite(shrinks) or not covered:
        return None
    added = list(beneath.get_added_tokens_decoder().values())
    texts = [one.content for one in added]
    if beneath.normalizer is not None:
        texts += [beneath.normalizer.normalize_str(text) for text in texts]
    sizes = [len(text.encode()) if in_bytes else len(text) for text in texts]
    most = max(*map(len, vocabulary), *sizes)
    swallowing = tuple(one.content for one in added if one.lstrip or one.rstrip)
    return TokenLength(math.ceil(most * shrinks), in_bytes, dropped, swallowing)


def _parts(component: Any) -> list[dict[str, Any]] | None:
    """A normalizer's or pre-tokenizer's parts, as in tokenizer.json; None where it is written in Python."""
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
    """How many characters of its text one character of its result stands for, at most."""
    kind, pattern = normalizer["type"], normalizer.get("pattern", {})
    if kind in _KEEPING_NORMALIZERS:
        return 1
    if kind in ("NFC", "NFKC"):
        return _COMPOSED
    if kind == "Replace" and "String" in pattern and normalizer["content"]:
        return max(1.0, len(pattern["String"]) / len(normalizer["content"]))
    return math.inf


def _keeps_text(splitter: dict[str, Any]) -> bool:
    """Whether all the text that it splits is there afterwards."""
    if splitter["type"] in ("Split", "Punctuation"):
        return bool(splitter["behavior"] != "Removed")
    return splitter["type"] in _KEEPING_PRE_TOKENIZERS


def _missing_bytes(vocabulary: dict[str, int]) -> bytes:
    letters = bytes_to_unicode().items()
    return bytes(byte for byte, letter in letters if letter not in vocabulary and byte not in _IN_NO_TEXT)


def _covers_everything(model: models.BPE, vocabulary: dict[str, int]) -> bool:
    """Whether no chunk of text is dropped, or becomes one unknown token."""
    if model.byte_fallback and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
        return True
    return model.unk_token is not None and not model.fuse_unk
