"""The end of a connection whose client may still be sending (RFC 9112, section 9.6).

Closing a socket with unread bytes resets the connection, and the reset destroys a response in flight. So the
sending half is closed first, and further input is read and discarded, unparsed and at a bounded rate, until
the client closes its half or the time limit passes.
"""

import asyncio
from collections.abc import Callable
from typing import Any

_PACE_SECONDS = 0.05  # between two reads, of up to 256 KiB each
_CHECK_SECONDS = 0.25


class LingeringTransport(asyncio.Transport):
    """A transport whose ``close`` lingers if the client may still be sending.

    Args:
        transport: the socket's own.
        must_linger: returns whether the client may still be sending; called on ``close``.
        linger: called at most once, in place of closing the socket.
    """

    def __init__(
        self, transport: asyncio.Transport, must_linger: Callable[[], bool], linger: Callable[[], None]
    ) -> None:
        super().__init__()
        self.inner = transport
        self._must_linger, self._linger = must_linger, linger
        self.lingers = False
        # called for every chunk of every response: bound directly, without a wrapper
        self.write = transport.write  # type: ignore[method-assign]
        self.writelines = transport.writelines  # type: ignore[method-assign]
        self.get_write_buffer_size = transport.get_write_buffer_size  # type: ignore[method-assign]
        self.get_extra_info = transport.get_extra_info  # type: ignore[method-assign]

    def close(self) -> None:
        if self.is_closing():
            return
        if self.inner.can_write_eof() and self._must_linger():
            self.lingers = True
            self._linger()
        else:
            self.inner.close()

    def is_closing(self) -> bool:
        return self.lingers or self.inner.is_closing()

    def abort(self) -> None:
        self.inner.abort()

    def pause_reading(self) -> None:
        if not self.is_closing():
            self.inner.pause_reading()

    def resume_reading(self) -> None:
        if not self.is_closing():
            self.inner.resume_reading()


class Linger(asyncio.Protocol):
    """Replaces a connection's protocol until the socket is closed.

    Args:
        transport: the socket's own.
        owner: the replaced protocol; receives write pauses and ``connection_lost`` only.
        seconds: maximum time after the whole response was sent.
        on_sent: called once when the whole response was sent.
    """

    def __init__(
        self, transport: Any, owner: asyncio.Protocol, seconds: float, on_sent: Callable[[], None]
    ) -> None:
        self._transport, self._owner, self._on_sent = transport, owner, on_sent
        self._loop = asyncio.get_running_loop()
        self._seconds = seconds
        self._end: float | None = None
        self._timers: list[asyncio.TimerHandle] = []

    def begin(self) -> None:
        self._transport.set_protocol(self)
        try:
            self._transport.write_eof()
        except OSError:  # the client has gone
            self._transport.abort()
            return
        self._transport.resume_reading()
        self._check()

    def data_received(self, data: bytes) -> None:
        self._transport.pause_reading()
        self._timers[1:] = [self._loop.call_later(_PACE_SECONDS, self._transport.resume_reading)]

    def pause_writing(self) -> None:
        self._owner.pause_writing()

    def resume_writing(self) -> None:
        self._owner.resume_writing()

    def _check(self) -> None:
        """Starts the time limit when all is sent; until then the owner aborts clients that stop reading."""
        now = self._loop.time()
        if self._end is None and not self._transport.get_write_buffer_size():
            self._end = now + self._seconds
            self._on_sent()
        if self._end is not None and now >= self._end:
            self._transport.abort()
        else:
            self._timers[:1] = [self._loop.call_later(_CHECK_SECONDS, self._check)]

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in self._timers:
            timer.cancel()
        self._owner.connection_lost(exc)
