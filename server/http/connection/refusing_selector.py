"""The event loop looks at its sockets less often while requests are refused: more refusals for each wake-up.

A wake-up takes the core from the thread that computes, and what that thread had in the core's caches. The
thread wakes the loop after each of its steps anyway, and the sockets can wait for that.
"""

import asyncio
import select
import selectors
from collections.abc import Callable
from typing import Any

PAUSE_SECONDS = 0.005
"""The most that it adds to the time until a response; a refusal is to take less than 50 ms."""
_EpollSelector: Any = getattr(selectors, "EpollSelector", object)


class RefusingSelector(_EpollSelector):
    """After a pass of the event loop that refused requests, waits for other threads and timers alone, for at
    most ``PAUSE_SECONDS``, before it looks at all files again. Linux only.

    Args:
        refused: returns how many requests have been refused so far.
    """

    def __init__(self, refused: Callable[[], int]) -> None:
        super().__init__()
        self._refused, self._seen = refused, refused()
        self._wake_ups: select.epoll | None = None

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """The first file is the event loop's own pipe, through which threads and signals wake it."""
        key: selectors.SelectorKey = super().register(fileobj, events, data)
        if self._wake_ups is None:
            self._wake_ups = select.epoll()
            self._wake_ups.register(key.fd, select.EPOLLIN)
        return key

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        refused = self._refused()
        if refused != self._seen and timeout != 0 and self._wake_ups is not None:
            pause = PAUSE_SECONDS if timeout is None else min(timeout, PAUSE_SECONDS)
            self._wake_ups.poll(pause, 1)
            self._seen, timeout = refused, 0
        found: list[tuple[selectors.SelectorKey, int]] = super().select(timeout)
        return found

    def close(self) -> None:
        if self._wake_ups is not None:
            self._wake_ups.close()
        super().close()


def loop_factory(refused: Callable[[], int]) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Makes asyncio's event loop on a ``RefusingSelector``; None where there is no epoll."""
    if not hasattr(selectors, "EpollSelector"):
        return None
    return lambda: asyncio.SelectorEventLoop(RefusingSelector(refused))
