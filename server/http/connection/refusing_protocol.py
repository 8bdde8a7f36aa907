"""Requests refused by their head alone, answered below HTTP's state machine.

Under overload such responses take CPU time from the requests being served, so they use no parser, no request
cycle and no timer of their own.
"""

import asyncio
from typing import TYPE_CHECKING, Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from server.http.admission.promised_places import Promise
from server.http.connection.early_refusal import Refusal
from server.http.connection.framing import RequestParser
from server.http.connection.reader_clock import HeadClock, ReaderClock

if TYPE_CHECKING:
    from server.http.server_config import ServerConfig


class RefusingProtocol(H11Protocol):
    """uvicorn's protocol; received data passes through ``_refuse_early`` first."""

    _head: HeadClock
    _reader: ReaderClock

    def __init__(
        self,
        config: "ServerConfig",
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn: RequestParser = RequestParser()
        self.app_state = dict(app_state)
        self._unparsed = bytearray()
        self._early_refusal = config.early_refusal
        self._skipping = 0  # bytes of a refused request's body still to arrive
        self._ends_after_body = False
        self._at_start = False  # true: between two requests; false: unknown
        self._idle_since = 0.0

    @property
    def promise(self) -> Promise | None:
        """The place kept for the next request, also passed in its scope; setting None changes nothing."""
        found: Promise | None = self.app_state.get("promise")
        return found

    @promise.setter
    def promise(self, promise: Promise | None) -> None:
        if promise is not None:
            self.app_state["promise"] = promise

    def _release_promise(self) -> None:
        if (promise := self.app_state.pop("promise", None)) is not None:
            promise.release()

    def _refuse_early(self, data: bytes) -> bytes:
        """Answers a request that is refused below HTTP's state machine; returns the remaining data.

        One request per call: those behind it in the same packet take the usual path, one after another.
        """
        judged = "promise" in self.app_state or self.flow.write_paused or not self._between_requests()
        found = self._early_refusal.judge(data) if data and not judged else None
        if isinstance(found, Promise):
            self.promise = found
        if not isinstance(found, Refusal):
            return data
        self.transport.write(found.answer)
        end = found.head_bytes + found.body_bytes
        self._skipping, self._ends_after_body = max(0, end - len(data)), found.close
        self.server_state.total_requests += 1
        self._head.stop()
        self._reader.stop()
        self._reader.watch(self.cycle)
        return self._await_next(data[end:])

    def _skip(self, data: bytes) -> bytes:
        """Drops the bytes that belong to the body of a refused request."""
        skipped = min(self._skipping, len(data))
        self._skipping -= skipped
        return b"" if self._skipping else self._await_next(data[skipped:])

    def _await_next(self, data: bytes) -> bytes:
        """After a refusal: returns the bytes of the next request, if there may be one."""
        if self._skipping:
            self._unset_keepalive_if_required()
        elif self._ends_after_body:
            self.transport.close()
            return b""
        else:
            self._head.stop()
            self._keep_alive()
        return data

    def _keep_alive(self) -> None:
        """Uses one timer that re-arms itself: one for each of thousands of refusals would cost more."""
        self._idle_since = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def timeout_keep_alive_handler(self) -> None:
        self.timeout_keep_alive_task = None
        if self.loop.time() - self._idle_since < self.timeout_keep_alive:
            left = self._idle_since + self.timeout_keep_alive - self.loop.time()
            self.timeout_keep_alive_task = self.loop.call_later(left, self.timeout_keep_alive_handler)
        else:
            super().timeout_keep_alive_handler()

    def _between_requests(self) -> bool:
        """Whether the next byte is the first of a request."""
        if not self._at_start:
            answered = self.cycle is None or self.cycle.response_complete
            states = (self.conn.our_state, self.conn.their_state)
            unparsed = self._unparsed or self.conn.received
            self._at_start = answered and states == (h11.IDLE, h11.IDLE) and not unparsed
        return self._at_start
