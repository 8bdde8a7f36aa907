"""A reader that stops, or takes too long in all, is cut off."""

import asyncio


class ReaderClock:
    """Runs while a transport has bytes that its reader doesn't take.

    Closing waits until all is sent, so that a reader which stopped would keep it open for ever.

    Args:
        transport: aborted when the reader's time is over.
        patience: seconds within which a reader must take something.
        limit: seconds that one answer may wait for its reader, in all its pauses together.
    """

    def __init__(self, transport: asyncio.Transport, patience: float, limit: float) -> None:
        self._transport, self._patience, self._limit = transport, patience, limit
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._unsent = 0
        self._answer: object = None
        self._waited, self._since = 0.0, 0.0

    def watch(self, answer: object) -> None:
        """Something of ``answer`` may be unsent. Another one than the last has all its time."""
        self._unsent = self._transport.get_write_buffer_size()
        if self._unsent and self._timer is None:
            if answer is not self._answer:
                self._answer, self._waited = answer, 0.0
            self._since = self._loop.time()
            soon = min(self._patience, self._limit - self._waited)
            self._timer = self._loop.call_later(soon, self._check)

    def stop(self) -> None:
        """The reader has taken enough for now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._waited += self._loop.time() - self._since

    def _check(self) -> None:
        self.stop()
        stopped = 0 < self._unsent <= self._transport.get_write_buffer_size()
        if stopped or self._waited >= self._limit:
            self._transport.abort()
        else:
            self.watch(self._answer)
