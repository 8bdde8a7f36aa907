"""Timeouts on reading: connections whose client stops reading, or reads too slowly, are aborted.

A client must read something within the receive timeout, and the pauses of one response together are limited
too.
"""

import asyncio
from collections.abc import Callable


class ReaderClock:
    """Runs while a transport has unsent bytes.

    Closing waits until all is sent, so a client that stopped reading would keep the connection open forever.

    Args:
        transport: the connection's.
        seconds: within which the client must read something.
        in_all: maximum seconds of all pauses of one response together.
    """

    def __init__(self, transport: asyncio.Transport, seconds: float, in_all: float) -> None:
        self._transport, self._seconds, self._in_all = transport, seconds, in_all
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._unsent = 0
        self._answer: object = None
        self._since, self._waited = 0.0, 0.0

    def watch(self, answer: object) -> None:
        """Starts the clock if anything is unsent. A new response starts with the full time."""
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
        """Stops the clock and adds the pause to the response's total."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._waited += self._loop.time() - self._since


class HeadClock:
    """Runs until the head of a request has arrived.

    Args:
        loop: the connection's.
        seconds: within which the head must arrive.
        late: called once if it doesn't.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float, late: Callable[[], None]) -> None:
        self._loop, self._seconds, self._late = loop, seconds, late
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Starts the clock unless it runs already."""
        if self._timer is None:
            self._timer = self._loop.call_later(self._seconds, self._is_late)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _is_late(self) -> None:
        self._timer = None
        self._late()
