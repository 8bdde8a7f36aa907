"""Readers that stop, or are too slow, are cut off.

Something of what was sent must be taken within the receive timeout, and an answer waits for its reader only
so long in all.
"""

import asyncio
from collections.abc import Callable


class ReaderClock:
    """Runs while a transport has bytes that its reader doesn't take.

    Closing waits until all is sent, so that a reader which stopped would keep it open for ever.

    Args:
        transport: the connection's.
        seconds: within which something must be taken.
        in_all: seconds that an answer may wait for its reader, in all its pauses together.
    """

    def __init__(self, transport: asyncio.Transport, seconds: float, in_all: float) -> None:
        self._transport, self._seconds, self._in_all = transport, seconds, in_all
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._unsent = 0
        self._answer: object = None
        self._since, self._waited = 0.0, 0.0

    def watch(self, answer: object) -> None:
        """Its reader is waited for, if anything is unsent. Another answer than before has all its time."""
        if answer is not self._answer:
            self.stop()
            self._answer, self._waited = answer, 0.0
        self._unsent = self._transport.get_write_buffer_size()
        if self._unsent and self._timer is None:
            self._since = self._loop.time()
            soon = min(self._seconds, self._in_all - self._waited)
            self._timer = self._loop.call_later(soon, self._check)

    def _check(self) -> None:
        self.stop()
        stopped = 0 < self._unsent <= self._transport.get_write_buffer_size()
        if stopped or self._waited >= self._in_all:
            self._transport.abort()
        else:
            self.watch(self._answer)

    def stop(self) -> None:
        """The reader has taken enough for now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._waited += self._loop.time() - self._since


class HeadClock:
    """Runs while the head of a request is awaited.

    Args:
        loop: the connection's.
        seconds: within which it must be there.
        late: called once if it isn't.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float, late: Callable[[], None]) -> None:
        self._loop, self._seconds, self._late = loop, seconds, late
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """From now on, unless it runs already."""
        if self._timer is None:
            self._timer = self._loop.call_later(self._seconds, self._is_late)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _is_late(self) -> None:
        self._timer = None
        self._late()
