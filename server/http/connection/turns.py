"""Parsing yields to the event loop: connections with unparsed bytes take turns.

However much all connections send, one loop iteration spends about ``PASS_SECONDS`` on parsing; each
connection parses a few events per turn. Its reading is paused meanwhile, so that the unparsed bytes are at
most those of one read.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from uvicorn.protocols.http.flow_control import FlowControl

FIRST_EVENTS = 4
"""Parsed immediately when bytes arrive: enough for a typical request's head, data and end."""
TURN_EVENTS = 32
PASS_SECONDS = 0.002
_log = logging.getLogger(__name__)


class Turn(Protocol):
    def take_turn(self, events: int) -> None:
        """Parses at most ``events`` events; requests another turn if there are more."""

    def abort(self) -> None:
        """Closes the connection without sending anything."""


class ParseTurns:
    """A FIFO queue of connections waiting to parse. One for all connections of a server."""

    def __init__(self) -> None:
        self._waiting: deque[Turn] = deque()
        self._known: set[Turn] = set()
        self._running = False

    def __contains__(self, connection: Turn) -> bool:
        return connection in self._known

    def add(self, connection: Turn) -> None:
        if connection in self._known:
            return
        self._known.add(connection)
        self._waiting.append(connection)
        self._schedule()

    def _schedule(self) -> None:
        if not self._running and self._waiting:
            self._running = True
            asyncio.get_running_loop().call_soon(self._pass)

    def _pass(self) -> None:
        end = time.perf_counter() + PASS_SECONDS
        while self._waiting and time.perf_counter() < end:
            connection = self._waiting.popleft()
            self._known.discard(connection)
            try:
                connection.take_turn(TURN_EVENTS)
            except Exception:  # one connection's error must not stop the others
                _log.exception("a connection failed while its requests were parsed")
                connection.abort()
        self._running = False
        self._schedule()


class ReadFlow(FlowControl):
    """uvicorn's flow control, but calls ``resume`` in place of the transport's ``resume_reading``."""

    def __init__(self, transport: asyncio.Transport, resume: Callable[[], None]) -> None:
        super().__init__(transport)
        self._resume = resume

    def resume_reading(self) -> None:
        if self.read_paused:
            self.read_paused = False
            self._resume()
