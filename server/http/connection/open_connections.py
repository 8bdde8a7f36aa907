"""The limit on open connections, and which of them are closed for new ones."""

import logging
import time
from enum import Enum
from typing import Protocol

_log = logging.getLogger(__name__)
_LOG_SECONDS = 1.0


class Stage(Enum):
    """What a connection waits for."""

    IDLE = "the first byte of a request"
    RECEIVING = "the rest of a request"
    BUSY = "the server"


class Evictable(Protocol):
    def evict(self) -> None:
        """Closes the connection to make room for another."""

    def abort(self) -> None:
        """Closes it without sending anything."""


class OpenConnections:
    """All connections of a server by stage, the longest wait first.

    A new connection beyond the limit evicts the one that has been idle for longest; if none is idle, the one
    whose request has been arriving for longest; if all requests have arrived, it is refused.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._stages: dict[Evictable, Stage] = {}
        self._waiting: dict[Stage, dict[Evictable, None]] = {Stage.IDLE: {}, Stage.RECEIVING: {}}
        self._lingering: dict[Evictable, None] = {}
        self._linger_limit = max(4, limit // 8)
        self._warnings = RateLimited()

    @property
    def room(self) -> int:
        """How many more connections fit without an eviction."""
        return self.limit - len(self._stages)

    def admit(self, connection: Evictable) -> bool:
        """Registers a new connection, evicting another if necessary; returns whether it may stay."""
        if self.room <= 0 and not self.make_room():
            self._warnings.warning("all %d connections are at work: refusing newcomers", self.limit)
            return False
        self._stages[connection] = Stage.BUSY
        return True

    def set_stage(self, connection: Evictable, stage: Stage) -> None:
        """Sets what an admitted connection waits for; a change restarts its wait."""
        before = self._stages.get(connection)
        if before is None or before is stage:
            return
        self._leave(connection, before)
        self._stages[connection] = stage
        if stage in self._waiting:
            self._waiting[stage][connection] = None

    def make_room(self) -> bool:
        """Evicts the connection that has waited for its client for longest; False if there is none."""
        for waiting in self._waiting.values():
            if waiting:
                oldest = next(iter(waiting))
                self.remove(oldest)
                oldest.evict()
                return True
        return False

    def free_a_file(self) -> bool:
        """As ``make_room``; lingering connections, already answered, go first."""
        if self._lingering:
            self._abort_oldest_lingering()
            return True
        return self.make_room()

    def linger(self, connection: Evictable) -> None:
        """Stops counting an answered connection. The number that linger is limited; the oldest is aborted."""
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
    """A warning that may recur thousands of times: at most one line a second, with a count of the others."""

    def __init__(self) -> None:
        self._last, self._suppressed = float("-inf"), 0

    def warning(self, message: str, *arguments: object) -> None:
        now = time.monotonic()
        if now - self._last < _LOG_SECONDS:
            self._suppressed += 1
            return
        more = f" ({self._suppressed} more since the last such line)" if self._suppressed else ""
        _log.warning(message + more, *arguments)
        self._last, self._suppressed = now, 0
