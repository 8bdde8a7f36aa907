"""Refusing below the framework: from the bytes of a request's head to the bytes of its answer.

Under overload the server refuses far more requests than it serves, and refusing takes CPU time from the
requests being served. Only plain requests are answered here; every other one takes the usual path, where
``AdmissionControl`` makes the same decision.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from starlette.types import Scope

from server.errors import ServiceError
from server.http.admission.admission_control import AdmissionControl
from server.http.admission.promised_places import Promise
from server.http.admission.refusal_log import RefusalLog
from server.http.connection.plain_head import PlainHead, PlainHeads
from server.http.connection.refusal_response import RefusalResponses
from server.http.redaction import Redaction
from server.http.request_id import new_request_id, own_request_id
from server.settings.server import Settings

TraceContext = Callable[[Scope], AbstractContextManager[None]]


@dataclass(slots=True)
class Refusal:
    """The response to a refused request, whose body has to be skipped."""

    answer: bytes
    head_bytes: int
    body_bytes: int
    close: bool
    """Whether the connection ends after this response."""


class EarlyRefusal:
    """One per server. Event loop only.

    Args:
        admission: decides whether a request is admitted.
        settings: with CORS configured, requests from web pages need headers that are not added here.
        trace_context: attributes what is counted inside it to the request's trace.
    """

    def __init__(
        self,
        admission: AdmissionControl,
        settings: Settings,
        trace_context: TraceContext | None = None,
    ) -> None:
        self._admission, self._trace_context = admission, trace_context
        self.routes = admission.routes
        # a response to a web page needs CORS headers
        not_plain = {b"origin"} if settings.cors_allow_origin else set()
        self._heads = PlainHeads(self.routes.takes_a_place, not_plain)
        self._responses = RefusalResponses()
        self._redaction = Redaction(settings.secrets())
        self.log = RefusalLog(self._redaction)
        self.refused = 0
        """Requests refused so far."""

    @property
    def is_full(self) -> bool:
        """Whether a request that needs a place is refused now."""
        return self._admission.is_full

    def judge(self, data: bytes, only: bool = False) -> Refusal | Promise | None:
        """The refusal of the request that ``data`` begins with, or the place promised to it.

        None if it takes the usual path without either.

        Args:
            data: the bytes received so far.
            only: judge only if ``data`` is one whole request; a refusal then ends the connection.
        """
        if (head := self._heads.of(data)) is None:
            return None
        began, missing = time.perf_counter(), head.size + head.body_bytes - len(data)
        if only and missing:
            return None
        id_, close = self._request_id(head), only or head.close
        scope = {**head.scope, "state": {"request_id": id_}}
        if self._trace_context is None:
            found = self._admission.judge(scope, head.body_bytes, missing <= 0)
        else:
            with self._trace_context(scope):
                found = self._admission.judge(scope, head.body_bytes, missing <= 0)
        if not isinstance(found, ServiceError):
            return found
        self.refused += 1
        status, answer = self._responses.encoded(found, self.routes.of(scope).dialect, id_, close)
        self.log.add(scope, found, status, time.perf_counter() - began)
        return Refusal(answer, head.size, head.body_bytes, close)

    def _request_id(self, head: PlainHead) -> str:
        own = own_request_id(head.scope, self._redaction) if head.names_an_id else None
        return own or new_request_id()
