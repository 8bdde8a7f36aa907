"""Places: how many requests may be in progress, and with which error others are refused."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol

from server.errors import Overloaded, ServiceError
from server.http.admission.promised_places import PromisedPlaces, release_held
from server.lifecycle import Lifecycle
from server.observability.ended import Ended, Observer, Operation

UNREAD = "unread"
"""The metrics' precision label of a request that is refused before its body is read."""
_DRAIN_AGE = 0.25  # seconds for which the estimate behind ``Retry-After`` is reused


class Backlog(Protocol):
    """The part of ``HostResources`` that estimates how long its queues are."""

    def drain_seconds(self) -> float | None: ...


class Places:
    """Counts the requests in progress and refuses those above the limit. Event loop only.

    Args:
        limit: the most places.
        lifecycle: refuses every place once the server drains or has failed.
        backlog: from which ``Retry-After`` is estimated.
        observer: counts what is refused unread.
    """

    def __init__(self, limit: int, lifecycle: Lifecycle, backlog: Backlog, observer: Observer) -> None:
        self._limit, self._lifecycle = limit, lifecycle
        self._backlog, self._observer = backlog, observer
        self.in_flight = 0
        """Places taken: continuations open or opening, and other work that holds one."""
        self.promised = PromisedPlaces()
        self.on_arrival: Callable[[], None] = lambda: None
        """Called whenever a place is reserved."""
        self._drain, self._drain_measured = 0.0, -math.inf
        self._full = self._overloaded(Overloaded.retry_spread)
        self._unread: dict[tuple[str, bool], Ended] = {}

    def refusal(self, count: int) -> ServiceError | None:
        """The ``NotReady`` or ``Overloaded`` with which ``reserve`` would fail now.

        Not to be raised: thousands of refusals a second share one.
        """
        if (not_ready := self._lifecycle.refusal()) is not None:
            return not_ready
        if self.in_flight + self.promised.count + count <= self._limit:
            return None
        if (spread := self.retry_spread()) != self._full.retry_spread:
            self._full = self._overloaded(spread)
        return self._full

    def reserve(self, count: int) -> None:
        """Takes ``count`` places, which ``release`` gives back.

        Raises:
            NotReady, Overloaded: none is taken.
        """
        release_held()
        if (error := self.refusal(count)) is not None:
            raise self._overloaded(self._full.retry_spread) if error is self._full else error
        self.in_flight += count
        self.on_arrival()

    def release(self, count: int) -> None:
        self.in_flight -= count

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Holds one place for work that opens no continuation.

        Raises:
            NotReady, Overloaded
        """
        self.reserve(1)
        try:
            yield
        finally:
            self.release(1)

    def hold(self) -> Callable[[], None]:
        """Takes a place for a computed answer, even above the limit; returns an idempotent release."""
        held = ExitStack()
        self.in_flight += 1
        held.callback(self.release, 1)
        return held.close

    def observe_unread(self, error: ServiceError, is_chat: bool) -> None:
        """Counts a generation that is refused before its request is read."""
        key = error.outcome, is_chat
        ended = self._unread.get(key)
        if ended is None:
            operation: Operation = "chat" if is_chat else "text_completion"
            ended = self._unread[key] = Ended(precision=UNREAD, outcome=error.outcome, operation=operation)
        self._observer.observe_request(ended)

    def _overloaded(self, spread: float) -> Overloaded:
        return Overloaded(f"all {self._limit} places are taken", retry_spread=spread)

    def retry_spread(self) -> float:
        """Seconds over which the retries of refused clients are spread: twice the time in which the queue
        drains, so that a client returns when it has drained on average, and some find a place sooner."""
        now = time.perf_counter()
        if now - self._drain_measured > _DRAIN_AGE:
            self._drain, self._drain_measured = self._backlog.drain_seconds() or 0.0, now
        return max(2 * self._drain, Overloaded.retry_spread)
