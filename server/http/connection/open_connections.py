"""How many connections there may be, and which of them make room for newcomers."""

import logging
import time
from enum import Enum
from typing import Protocol

_log = logging.getLogger(__name__)
_LOG_SECONDS = 1.0


class Stage(Enum):
    """What the server waits for."""

    IDLE = "a first byte of a request, or the next one"
    RECEIVING = "the rest of a request"
    BUSY = "its own work"


class Evictable(Protocol):
    def evict(self) -> None:
        """Ends the connection now: its place is needed."""

    def abort(self) -> None:
        """Ends it without another word."""


class OpenConnections:
    """All connections of a server by what they wait for, the longest wait first.

    A newcomer beyond the limit takes the place of the connection that has been idle for longest; where none
    is idle, of the one whose request has been arriving for longest; where all requests are here, it is
    refused.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._stages: dict[Evictable, Stage] = {}
        self._waiting: dict[Stage, dict[Evictable, None]] = {Stage.IDLE: {}, Stage.RECEIVING: {}}
        self._lingering: dict[Evictable, None] = {}
        self._linger_limit = max(4, limit // 8)
        self._said = RateLimited()

    def admit(self, connection: Evictable) -> bool:
        """Whether a new connection may stay, if another must go for it."""
        if len(self._stages) >= self.limit and not self.make_room():
            self._said.warning("all %d connections are at work: refusing newcomers", self.limit)
            return False
        self._stages[connection] = Stage.BUSY
        return True

    def settle(self, connection: Evictable, stage: Stage) -> None:
        """What an admitted connection waits for now. Its wait begins where that changes."""
        before = self._stages.get(connection)
        if before is None or before is stage:
            return
        self._leave(connection, before)
        self._stages[connection] = stage
        if stage in self._waiting:
            self._waiting[stage][connection] = None

    def make_room(self) -> bool:
        """Ends the connection that has waited for its client for longest; False if there is none."""
        for waiting in self._waiting.values():
            if waiting:
                oldest = next(iter(waiting))
                self.remove(oldest)
                oldest.evict()
                return True
        return False

    def free_a_file(self) -> bool:
        """As ``make_room``; connections that are answered and only linger go first."""
        if self._lingering:
            self._abort_oldest_lingering()
            return True
        return self.make_room()

    def linger(self, connection: Evictable) -> None:
        """It is answered and no longer counts; only so many linger, the oldest goes first."""
        self.remove(connection)
        self._lingering[connection] = None
        if len(self._lingering) > self._linger_limit:
            self._abort_oldest_lingering()

    def abort_lingering(self) -> None:
        while self._lingering:
            self._abort_oldest_lingering()

    def remove(self, connection: Evictable) -> None:
        stage = self._stages.pop(connection, None)
        if stage is not None:
            self._leave(connection, stage)
        self._lingering.pop(connection, None)

    def _abort_oldest_lingering(self) -> None:
        oldest = next(iter(self._lingering))
        del self._lingering[oldest]
        oldest.abort()

    def _leave(self, connection: Evictable, stage: Stage) -> None:
        if stage in self._waiting:
            del self._waiting[stage][connection]


class RateLimited:
    """A warning whose cause may come thousands of times: one line a second, with how many there were."""

    def __init__(self) -> None:
        self._last, self._unsaid = float("-inf"), 0

    def warning(self, message: str, *arguments: object) -> None:
        now = time.monotonic()
        if now - self._last < _LOG_SECONDS:
            self._unsaid += 1
            return
        more = f" ({self._unsaid} more since the last such line)" if self._unsaid else ""
        _log.warning(message + more, *arguments)
        self._last, self._unsaid = now, 0
