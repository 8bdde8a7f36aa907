"""Refusing requests as their connection is accepted, before it has a protocol or a timer."""

import contextlib
import socket
from typing import NamedTuple

from server.http.admission.promised_places import Promise
from server.http.connection.early_refusal import EarlyRefusal, Refusal

_READ = 16 * 1024  # longer requests take the usual path
_DEFER_SECONDS = 1
# as integers: combining the enumerations takes almost as long as sending
_DONT_WAIT = int(socket.MSG_DONTWAIT)
# response and FIN leave in one packet and wake the client once
_WITH_THE_END = _DONT_WAIT | int(getattr(socket, "MSG_MORE", 0))


class NewConnection(NamedTuple):
    """An accepted connection that was not refused."""

    socket: socket.socket
    begun: bytes
    """What has been read from it."""
    promise: Promise | None
    """The place promised to its first request."""


class Listener:
    """A listening socket that refuses as it accepts.

    Args:
        listener: non-blocking.
    """

    def __init__(self, listener: socket.socket, early_refusal: EarlyRefusal) -> None:
        self._listener, self._early_refusal = listener, early_refusal
        self._kind = int(listener.family), int(listener.type), listener.proto

    def accept(self) -> NewConnection | None:
        """Accepts one connection and judges the whole request that it has sent.

        None if the request was refused: the response is sent and the connection closed.

        Raises:
            OSError: none was accepted.
        """
        # socket.accept() spends several times as long on its Python object and the enumerations of its kind
        number, _ = self._listener._accept()  # type: ignore[attr-defined]
        accepted = socket.SocketType(*self._kind, number)
        try:
            begun = accepted.recv(_READ, _DONT_WAIT)
        except OSError:  # nothing has arrived yet, or the client has disconnected
            begun = b""
        found = self._early_refusal.judge(begun, only=True)
        if isinstance(found, Refusal):
            with contextlib.suppress(OSError):  # the client may have disconnected
                accepted.send(found.answer, _WITH_THE_END)
            accepted.close()
            return None
        kept = socket.socket(*self._kind, accepted.detach())
        kept.setblocking(False)
        return NewConnection(kept, begun, found)


def defer_accept(listener: socket.socket) -> None:
    """Keeps connections in the kernel until they have sent something, or for a second; Linux only."""
    if not hasattr(socket, "TCP_DEFER_ACCEPT"):
        return
    with contextlib.suppress(OSError):  # some sandboxes define the option without supporting it
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, _DEFER_SECONDS)
