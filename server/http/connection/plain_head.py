"""Request heads plain enough to be parsed without HTTP's state machine.

Clients send identical heads before one body after another, so most heads are found in a cache of parsed
ones.
"""

import re
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

from starlette.types import Scope

from server.http.connection.framing import HEAD_BYTES, HEAD_LINES

# A subset of what h11 accepts, without anything ambiguous. The target is not decoded here.
_HEAD = re.compile(
    rb"POST (/[!-$&-~]*) HTTP/1\.1\r\n((?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t -~\x80-\xff]*\r\n)+)\r\n"
)
_MOST_DIGITS = 18  # of a length: longer ones are ambiguous
_NOT_PLAIN = frozenset({b"transfer-encoding", b"expect", b"upgrade"})
_KEPT, _KEPT_BYTES = 64, 2048  # cached heads, and their maximum size
_Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class PlainHead:
    """A parsed head."""

    size: int
    """Bytes, including the empty line."""
    scope: dict[str, Any]
    """The part of an ASGI scope that admission, log and traces read; shared, not to be changed."""
    body_bytes: int
    close: bool
    """The client sent ``Connection: close``."""
    names_an_id: bool
    """It has an ``X-Request-ID``."""


class PlainHeads:
    """Parses plain heads and caches them.

    Args:
        is_wanted: returns whether a request with this scope is to be parsed here.
        not_plain: header names, in lower case, that make a request not plain.
    """

    def __init__(self, is_wanted: Callable[[Scope], bool], not_plain: Set[bytes]) -> None:
        self._is_wanted, self._not_plain = is_wanted, _NOT_PLAIN | not_plain
        self._known: dict[bytes, PlainHead | None] = {}

    def of(self, data: bytes) -> PlainHead | None:
        """The head that ``data`` begins with; None if it is incomplete, not plain or not wanted."""
        end = data.find(b"\r\n\r\n", 0, HEAD_BYTES) + 4
        if end < 4:
            return None
        raw = data[:end]
        try:
            return self._known[raw]
        except KeyError:
            return self._keep(raw, self._parse(raw))

    def _keep(self, raw: bytes, head: PlainHead | None) -> PlainHead | None:
        if len(raw) <= _KEPT_BYTES:
            if len(self._known) >= _KEPT:
                self._known.clear()
            self._known[raw] = head
        return head

    def _parse(self, raw: bytes) -> PlainHead | None:
        found = _HEAD.fullmatch(raw)
        if found is None or found[2].count(b"\n") > HEAD_LINES - 2:
            return None
        path, _, query = found[1].partition(b"?")
        scope = {"type": "http", "method": "POST", "path": path.decode("ascii"), "query_string": query}
        if not self._is_wanted(scope):
            return None
        headers = _headers(found[2])
        if (length := self._body_bytes(headers)) is None:
            return None
        fields = dict(headers)
        close = fields.get(b"connection", b"").lower() == b"close"
        return PlainHead(len(raw), {**scope, "headers": headers}, length, close, b"x-request-id" in fields)

    def _body_bytes(self, headers: _Headers) -> int | None:
        """The value of ``Content-Length``; None if the request is not plain."""
        names = [name for name, _ in headers]
        if not self._not_plain.isdisjoint(names) or names.count(b"host") != 1:
            return None
        found = dict(headers)
        length = found.get(b"content-length", b"0")
        if len(length) > _MOST_DIGITS:
            return None
        if names.count(b"content-length") > 1 or names.count(b"connection") > 1 or not length.isdigit():
            return None
        if found.get(b"connection", b"close").lower() not in (b"close", b"keep-alive"):
            return None
        return int(length)


def _headers(lines: bytes) -> _Headers:
    pairs = (line.partition(b":") for line in lines.split(b"\r\n")[:-1])
    return [(name.lower(), value.strip(b" \t")) for name, _, value in pairs]
