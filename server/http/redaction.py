"""Finds API keys in text, and replaces them in what is logged or returned."""

import json
import re
from collections.abc import Iterable
from urllib.parse import quote, unquote_to_bytes

REDACTED = "[redacted]"
_ROUNDS = 3  # of percent-encoding
_LONG = 8  # characters; a shorter key may be part of another word


class Redaction:
    """Replaces keys in text: plain, percent-encoded or escaped in JSON."""

    def __init__(self, secrets: Iterable[str]) -> None:
        self._secrets = tuple(secrets)
        forms = [form for secret in self._secrets for form in _forms(secret)]
        self._pattern = re.compile("|".join(_pattern(form) for form in forms)) if forms else None

    def __call__(self, text: str) -> str:
        return self._pattern.sub(REDACTED, text) if self._pattern else text

    def is_in(self, raw: bytes) -> bool:
        """Whether an address or a header contains a key, percent-encoded or not.

        Not in constant time, unlike the comparison in ``server.http.auth``: a match grants no access.
        """
        return any(self._found(text) for text in _decoded(raw))

    def _found(self, text: str) -> bool:
        return self._pattern is not None and self._pattern.search(text) is not None

    def address(self, path: str) -> str:
        """The path without keys; ``REDACTED`` alone if a key is in nested percent-encoding."""
        shown = self(path)
        return REDACTED if self.is_in(shown.encode("utf-8", "surrogateescape")) else shown


def _decoded(raw: bytes) -> Iterable[str]:
    """Raw bytes as text after 0, 1, … rounds of percent-decoding; with a query's plus also as a space."""
    for _ in range(_ROUNDS):
        for encoding in ("utf-8", "latin-1"):
            text = raw.decode(encoding, "replace")
            yield text
            yield text.replace("+", " ")
        decoded = unquote_to_bytes(raw)
        if decoded == raw:
            return
        raw = decoded
    yield raw.decode("utf-8", "replace")


def _forms(secret: str) -> Iterable[str]:
    yield from dict.fromkeys((secret, quote(secret), quote(secret, safe=""), json.dumps(secret)[1:-1]))


def _pattern(text: str) -> str:
    found = re.escape(text)
    return found if len(text) >= _LONG else rf"(?<![A-Za-z0-9]){found}(?![A-Za-z0-9])"
