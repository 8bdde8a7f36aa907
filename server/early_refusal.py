"""Refusing below the framework: from the bytes of a request's head to the bytes of its answer.

Under overload the server refuses far more often than it serves, and what a refusal costs is taken from those
who are served. Only plain requests are answered here; every other one goes the usual way, where
``AdmissionControl`` decides the same.
"""

import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import Any

from pydantic_core import to_json
from starlette.types import Scope

from server.admission_control import AdmissionControl, takes_a_place
from server.errors import ServiceError
from server.framing import HEAD_BYTES, HEAD_LINES
from server.promised_places import Promise
from server.refusal_log import RefusalLog
from server.replies import error_body, error_headers, error_status
from server.request_id import request_id_of
from server.secret_text import Redaction
from server.settings import Settings

# No more than h11 takes, and nothing that could be understood in two ways. A target is not decoded here.
_HEAD = re.compile(
    rb"POST (/[!-$&-~]*) HTTP/1\.1\r\n((?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t -~\x80-\xff]*\r\n)+)\r\n"
)
_MOST_DIGITS = 18  # of a length: more could be read in two ways
_NOT_PLAIN = frozenset({b"transfer-encoding", b"expect", b"upgrade"})
Headers = list[tuple[bytes, bytes]]
TraceContext = Callable[[Scope], AbstractContextManager[None]]


@dataclass(slots=True)
class Refusal:
    """The answer to a request, whose body is to be skipped."""

    answer: bytes
    head_bytes: int
    body_bytes: int
    close: bool
    """The connection ends with this answer."""


class EarlyRefusal:
    """One per server. Event loop only.

    Args:
        admission: decides.
        settings: with CORS configured, requests of web pages need headers that are not made here.
        trace_context: makes what is counted within it part of the request's trace.
    """

    def __init__(
        self,
        admission: AdmissionControl,
        settings: Settings,
        trace_context: TraceContext = lambda scope: nullcontext(),
    ) -> None:
        self._admission, self._trace_context = admission, trace_context
        self._not_plain = _NOT_PLAIN | ({b"origin"} if settings.cors_allow_origin else set())
        self._redaction = Redaction(settings.secrets())
        self.log = RefusalLog(self._redaction)

    def judge(self, data: bytes, only: bool = False) -> Refusal | Promise | None:
        """Of the request that ``data`` begins with: its refusal, or the place that it gets on the usual way.

        None if it goes the usual way without either.

        Args:
            data: what has come.
            only: if there is a whole request and nothing else in it; the connection ends with a refusal then.
        """
        head = _HEAD.match(data, 0, HEAD_BYTES)
        if head is None or head[2].count(b"\n") > HEAD_LINES - 2 or not takes_a_place(_target(head[1])):
            return None
        began, headers = time.perf_counter(), _headers(head[2])
        length = self._body_bytes(headers)
        missing = 0 if length is None else head.end() + length - len(data)
        if length is None or (only and missing):
            return None
        scope = self._scope(head[1], headers)
        with self._trace_context(scope):
            found = self._admission.judge(scope, length, missing <= 0)
        if not isinstance(found, ServiceError):
            return found
        close = only or any(name == b"connection" and value.lower() == b"close" for name, value in headers)
        answer = _answer(found, scope, close)
        self.log.add(scope, found, time.perf_counter() - began)
        return Refusal(answer, head.end(), length, close)

    def _body_bytes(self, headers: Headers) -> int | None:
        """What ``Content-Length`` says; None if the request is not plain."""
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

    def _scope(self, target: bytes, headers: Headers) -> dict[str, Any]:
        """What admission, log and traces look at of an ASGI scope."""
        scope = {**_target(target), "headers": headers}
        scope["state"] = {"request_id": request_id_of(scope, self._redaction)}
        return scope


def _target(target: bytes) -> dict[str, Any]:
    path, _, query = target.partition(b"?")
    return {"type": "http", "method": "POST", "path": path.decode("ascii"), "query_string": query}


def _headers(lines: bytes) -> Headers:
    pairs = (line.partition(b":") for line in lines.split(b"\r\n")[:-1])
    return [(name.lower(), value.strip(b" \t")) for name, _, value in pairs]


@lru_cache
def _status_line(status: int) -> str:
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"


@lru_cache(maxsize=1)
def _date_line(second: int) -> str:
    return f"date: {formatdate(second, usegmt=True)}"


def _answer(error: ServiceError, scope: Scope, close: bool) -> bytes:
    path, id_ = scope["path"], scope["state"]["request_id"]
    status = error_status(error, path)
    body = to_json(error_body(error, path, id_))
    lines = [_status_line(status), _date_line(int(time.time()))]
    lines += [f"content-length: {len(body)}", "content-type: application/json"]
    lines += [f"{name.lower()}: {value}" for name, value in error_headers(error).items()]
    lines += [f"x-request-id: {id_}", *(["connection: close"] if close else []), "\r\n"]
    return "\r\n".join(lines).encode() + body
