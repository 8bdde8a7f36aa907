"""A lock for engines that share a CPU: a forward pass uses every core, and two at once slow each other."""

import threading
from collections import deque
from types import TracebackType


class FairLock:
    """A lock that is first come, first served, so that no precision can starve another.

    ``threading.Lock`` lets the thread that released it acquire it again before the threads that wait.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locked = False
        self._queue: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        with self._guard:
            if not self._locked:
                self._locked = True
                return
            ticket = threading.Lock()
            ticket.acquire()
            self._queue.append(ticket)
        ticket.acquire()  # released by the ``__exit__`` of the thread before

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._guard:
            if self._queue:
                self._queue.popleft().release()
            else:
                self._locked = False
