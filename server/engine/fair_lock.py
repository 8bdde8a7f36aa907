"""Engines of one CPU take turns: a forward pass uses every core; two at once get in each other's way."""

import threading
from collections import deque
from types import TracebackType


class FairLock:
    """A mutual exclusion that is first come, first served, so that no precision can starve another.

    ``threading.Lock`` lets the thread that just released it take it again at once.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._taken = False
        self._queue: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        with self._guard:
            if not self._taken:
                self._taken = True
                return
            mine = threading.Lock()
            mine.acquire()
            self._queue.append(mine)
        mine.acquire()  # opened by whoever's turn ends

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._guard:
            if self._queue:
                self._queue.popleft().release()
            else:
                self._taken = False
