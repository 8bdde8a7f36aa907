"""An HTTP session with a collector: why a request failed, also where exporters take it for a success."""

import os
import time
from collections.abc import Callable
from typing import Any

import requests
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from requests.exceptions import InvalidHeader, RequestException, Timeout

_PROVIDER = "OTEL_PYTHON_EXPORTER_OTLP_HTTP_{}CREDENTIAL_PROVIDER"
_LONGEST = 200  # characters of a reason
_LONGEST_ANSWER, _READING_SECONDS = 1 << 16, 5.0


class NotAccepted(RequestException):
    """The collector has answered, and taken nothing, or not all."""


class CollectorSession(requests.Session):
    """Raises where the exporters would take an answer for success: a redirect, a web page, rejected items.

    ``failure`` is why the last request failed, without keys; None if it did not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failure: str | None = None

    def request(self, method: str, url: str, *others: Any, **options: Any) -> requests.Response:
        """Raises: NotAccepted, and what ``requests`` raises."""
        self.failure = None
        own = {"allow_redirects": False, "stream": True}
        try:
            response = super().request(method, url, *others, **{**options, **own})
            response._content = _whole(response)  # as if it had not been streamed
        except Exception as error:
            self.failure = reason_of(error)
            raise
        self.failure = refusal_of(response)
        if self.failure is not None and response.ok:
            raise NotAccepted(self.failure)
        return response


def collector_session(signal: str) -> CollectorSession | None:
    """A session for ``TRACES`` or ``METRICS``; None where variables name a provider of authorized ones."""
    own = (_PROVIDER.format(""), _PROVIDER.format(f"{signal}_"))
    return None if any(os.environ.get(name) for name in own) else CollectorSession()


def why_failed(session: CollectorSession | None, export: Callable[[], bool]) -> str | None:
    """Exports; why that failed, or None.

    Args:
        export: whether the exporter succeeded, by what it says.
    """
    if session is not None:
        session.failure = None
    try:
        if export():
            return None
    except Exception as error:
        return reason_of(error)
    return (session and session.failure) or "the exporter gives no reason"


def unfinished(session: CollectorSession | None) -> str:
    """Why an export that still goes on has not succeeded: it may be waiting to try again."""
    return (session and session.failure) or "no answer before the end"


def refusal_of(response: requests.Response) -> str | None:
    """Why an answer is no success; None if it is one."""
    if response.is_redirect or 300 <= response.status_code < 400:
        target = response.headers.get("location", "").partition("?")[0]
        return _short(f"it redirects, {response.status_code}, to {target or 'nowhere'}")
    if not response.ok:
        return _short(f"it answered {response.status_code} {response.reason or ''}".strip())
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "text/html":
        return "it answered with a web page"
    return _rejected(response.content) if kind == "application/x-protobuf" else None


def _whole(response: requests.Response) -> bytes:
    """The body of a response.

    Raises:
        NotAccepted: it is no collector's: too long, or too slow.
    """
    body, end = bytearray(), time.monotonic() + _READING_SECONDS
    for byte in response.iter_content(1):  # a longer read would wait until all of it is there
        body += byte
        if len(body) > _LONGEST_ANSWER or time.monotonic() > end:
            response.close()
            raise NotAccepted("its answer does not end")
    return bytes(body)


def _rejected(body: bytes) -> str | None:
    """The partial success in an answer; its fields have the same numbers for traces and for metrics."""
    try:
        partial = ExportTraceServiceResponse.FromString(body).partial_success
    except DecodeError:
        return "its answer is not OTLP's"
    if not partial.rejected_spans:
        return None
    return _short(f"it rejected {partial.rejected_spans} of them: {partial.error_message}")


def reason_of(error: BaseException) -> str:
    """What has gone wrong beneath, in a few words. Neither the address, which may have a key, nor headers."""
    if isinstance(error, Timeout):
        return "no answer in time"
    if isinstance(error, NotAccepted):
        return str(error)
    if isinstance(error, InvalidHeader):
        return "a header of OTEL_EXPORTER_OTLP_HEADERS can't be sent"
    root = _root(error)
    if isinstance(root, RequestException):
        return type(root).__name__
    return _short((isinstance(root, OSError) and root.strerror) or str(root) or type(root).__name__)


def _root(error: BaseException) -> BaseException:
    seen = [error]
    while True:
        error = seen[-1]
        inside = (getattr(error, "reason", None), error.__cause__, error.__context__, *error.args)
        deeper = next((one for one in inside if isinstance(one, BaseException) and one not in seen), None)
        if deeper is None:
            return error
        seen.append(deeper)


def _short(text: str) -> str:
    """Printable and bounded: a collector's words go into the log."""
    shown = "".join(character if character.isprintable() else " " for character in text)
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 1]}…"
