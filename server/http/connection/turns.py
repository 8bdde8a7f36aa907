"""Parsing gives way to the event loop: connections with received bytes still to parse take turns.

However many connections send however much, a pass of the loop spends about ``PASS_SECONDS`` on them; each
gets a few events a turn. Meanwhile a connection's reading is paused, so that what waits is what one read
brought.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from uvicorn.protocols.http.flow_control import FlowControl

FIRST_EVENTS = 4
"""Parsed at once when bytes arrive: a whole request of the usual kind, its head, data and end."""
TURN_EVENTS = 32
PASS_SECONDS = 0.002
_log = logging.getLogger(__name__)


class Turn(Protocol):
    def take_turn(self, events: int) -> None:
        """Parses at most so many events; asks for another turn if there are more."""

    def abort(self) -> None:
        """Ends the connection without another word."""


class ParseTurns:
    """Who parses next, first come, first served. One for all connections of a server."""

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
            except Exception:  # the others have their turns whatever becomes of this one
                _log.exception("a connection failed while its requests were parsed")
                connection.abort()
        self._running = False
        self._schedule()


class ReadFlow(FlowControl):
    """uvicorn's own, but ``resume`` is called in place of the transport's ``resume_reading``."""

    def __init__(self, transport: asyncio.Transport, resume: Callable[[], None]) -> None:
        super().__init__(transport)
        self._resume = resume

    def resume_reading(self) -> None:
        if self.read_paused:
            self.read_paused = False
            self._resume()
