"""A reader that stops is cut off: something of what was sent must be taken within the receive timeout."""

import asyncio


class ReaderClock:
    """Runs while a transport has bytes that its reader doesn't take.

    Closing waits until all is sent, so that a reader which stopped would keep it open for ever.
    """

    def __init__(self, transport: asyncio.Transport, seconds: float) -> None:
        self._transport, self._seconds = transport, seconds
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._unsent = 0

    def watch(self) -> None:
        self._unsent = self._transport.get_write_buffer_size()
        if self._unsent and self._timer is None:
            self._timer = self._loop.call_later(self._seconds, self._check)

    def _check(self) -> None:
        self._timer = None
        if 0 < self._unsent <= self._transport.get_write_buffer_size():
            self._transport.abort()
        else:
            self.watch()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
