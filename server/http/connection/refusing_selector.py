"""The event loop looks at its sockets less often while it refuses requests: more refusals for each look.

Looking takes the core from the thread that computes, and a single refusal right after it costs several times
as much as one of many. What has to happen at once, does: threads and signals wake the loop, timers run, and
sockets are looked at as soon as a place is free.
"""

import asyncio
import select
import selectors
import time
from collections.abc import Callable
from typing import Any, Protocol

PAUSE_SECONDS = 0.015
"""Between two looks; a refusal is to take less than 50 ms."""
_EpollSelector: Any = getattr(selectors, "EpollSelector", object)
_Ready = list[tuple[selectors.SelectorKey, int]]


class Refusing(Protocol):
    """What the selector reads of ``EarlyRefusal``."""

    refused: int

    @property
    def is_full(self) -> bool: ...


class RefusingSelector(_EpollSelector):
    """After a pass of the event loop that refused requests, looks at the loop's own pipe alone until
    ``PAUSE_SECONDS`` after its last look at all files. Linux only.

    Args:
        refusing: counts refusals, and says whether a request that arrived now would be refused.
    """

    def __init__(self, refusing: Refusing) -> None:
        super().__init__()
        self._refusing, self._seen, self._looked = refusing, refusing.refused, 0.0
        self._pipe: selectors.SelectorKey | None = None
        self._wake_ups: select.epoll | None = None

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """The first file is the event loop's own pipe, through which threads and signals wake it."""
        key: selectors.SelectorKey = super().register(fileobj, events, data)
        if self._wake_ups is None:
            self._pipe, self._wake_ups = key, select.epoll()
            self._wake_ups.register(key.fd, select.EPOLLIN)
        return key

    def select(self, timeout: float | None = None) -> _Ready:
        if (left := self._pause_left()) > 0:
            woken = self._look_at_pipe(left if timeout is None else min(timeout, left))
            if woken or (timeout is not None and timeout <= left):
                return woken
            timeout = 0
        self._seen = self._refusing.refused
        found: _Ready = super().select(timeout)
        self._looked = time.monotonic()
        return found

    def _pause_left(self) -> float:
        """Seconds until sockets are looked at again."""
        if self._refusing.refused == self._seen or not self._refusing.is_full:
            return 0.0
        return self._looked + PAUSE_SECONDS - time.monotonic()

    def _look_at_pipe(self, timeout: float) -> _Ready:
        if self._pipe is None or self._wake_ups is None or not self._wake_ups.poll(timeout, 1):
            return []
        return [(self._pipe, selectors.EVENT_READ)]

    def close(self) -> None:
        if self._wake_ups is not None:
            self._wake_ups.close()
        super().close()


def loop_factory(refusing: Refusing) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Makes asyncio's event loop on a ``RefusingSelector``; None where there is no epoll."""
    if not hasattr(selectors, "EpollSelector"):
        return None
    return lambda: asyncio.SelectorEventLoop(RefusingSelector(refusing))
