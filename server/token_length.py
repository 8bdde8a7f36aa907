"""How much text one token can stand for at most: by it a far too long text is refused before it is encoded.

Only where that is certain. A tokenizer may shrink a text without bound before it looks up any token: drop
white space or control characters, or put one unknown token in the place of a whole word. Of such a one
nothing is said; its texts are encoded whatever their length.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

from tokenizers import models, pre_tokenizers
from transformers import TokenizersBackend

_MARGIN = 64  # tokens at the begin of a text's end, which may be others than in the whole text
_LOOK_BACK = 4096  # characters
_COMPOSED = 4  # characters that one composed by NFC or NFKC stands for, at most
_KEEPING_NORMALIZERS = {"Prepend", "Lowercase", "NFD", "NFKD", "ByteLevel"}  # no fewer characters than before
_KEEPING_PRE_TOKENIZERS = {"ByteLevel", "Metaspace", "Digits", "UnicodeScripts"}


@dataclass(frozen=True)
class TokenLength:
    """Of one tokenizer.

    Args:
        most: characters, or bytes of UTF-8, of the longest token.
        in_bytes: whether it is bytes.
        swallowing: tokens that take along the white space beside them, however much; nothing is known of a
            text that has one of them.
    """

    most: int
    in_bytes: bool
    swallowing: tuple[str, ...] = ()

    def fewest(self, text: str) -> int:
        """Tokens that the text has at least."""
        if any(token in text for token in self.swallowing):
            return 0
        size = len(text.encode("utf-8", "surrogatepass")) if self.in_bytes else len(text)
        return math.ceil(size / self.most)

    def end(self, text: str, tokens: int) -> str:
        """An end of the text whose last tokens, so many, are those of the whole text.

        That holds wherever the tokenizer splits a text at white space and none is longer than some thousand
        characters without any: the tokens at the seam may differ, and are not among the last.
        """
        kept = (tokens + _MARGIN) * self.most
        if len(text) <= kept + _LOOK_BACK or any(token in text for token in self.swallowing):
            return text
        at = len(text) - kept
        for seam in range(at, at - _LOOK_BACK, -1):
            before, first, second = text[seam - 1 : seam + 2]
            if first.isspace() and not before.isspace() and not second.isspace():
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
    if not math.isfinite(shrinks) or not _covers_everything(beneath.model, vocabulary, byte_level):
        return None
    added = list(beneath.get_added_tokens_decoder().values())
    texts = [one.content for one in added]
    if beneath.normalizer is not None:
        texts += [beneath.normalizer.normalize_str(text) for text in texts]
    in_bytes = byte_level and not normalizers
    most = max(map(len, [*vocabulary, *texts, *([text.encode() for text in texts] if in_bytes else [])]))
    swallowing = tuple(one.content for one in added if one.lstrip or one.rstrip)
    return TokenLength(int(most * shrinks), in_bytes, swallowing)


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


def _covers_everything(model: models.BPE, vocabulary: dict[str, int], byte_level: bool) -> bool:
    """Whether no stretch of text is dropped, or becomes one unknown token."""
    if byte_level:
        return all(letter in vocabulary for letter in pre_tokenizers.ByteLevel.alphabet())
    if model.byte_fallback and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
        return True
    return model.unk_token is not None and not model.fuse_unk
