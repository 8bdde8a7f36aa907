"""The access log of refused requests, limited to some lines per second and a count of the others."""

import asyncio
import logging
from collections import Counter

from starlette.types import Scope

from server.errors import ServiceError
from server.http.access_log import log_access
from server.http.redaction import Redaction
from server.http.responses import note_refusal

LINES_PER_SECOND = 10
_access = logging.getLogger("server.access")


class RefusalLog:
    """Limits the log under overload: a line per refusal would cost more than refusing, and hide others.

    Event loop only.
    """

    def __init__(self, redaction: Redaction) -> None:
        self._redaction = redaction
        self._lines = 0
        self._unlogged: Counter[int] = Counter()

    def add(self, scope: Scope, error: ServiceError, status: int, seconds: float) -> None:
        """Logs one refusal, or counts it if this second's lines are used up."""
        if not self._lines:
            asyncio.get_running_loop().call_later(1.0, self._end_second)
        if self._lines < LINES_PER_SECOND:
            self._lines += 1
            note_refusal(error, scope)
            log_access(scope, status, seconds * 1000, self._redaction)
        else:
            self._unlogged[status] += 1

    def _end_second(self) -> None:
        for status, count in sorted(self._unlogged.items()):
            _access.info("%d more requests were answered %d within a second", count, status)
        self._unlogged.clear()
        self._lines = 0
