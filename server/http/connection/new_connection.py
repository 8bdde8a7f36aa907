"""Refusing requests as their connection is accepted, before it has a protocol or a timer."""

import contextlib
import socket

from server.http.admission.promised_places import Promise
from server.http.connection.early_refusal import EarlyRefusal, Refusal

_PEEKED = 16 * 1024  # longer requests take the usual path
_DEFER_SECONDS = 1
# response and FIN leave in one packet and wake the client once
_WITH_THE_END = getattr(socket, "MSG_MORE", 0)


def defer_accept(listener: socket.socket) -> None:
    """Keeps connections in the kernel until they have sent something, or for a second; Linux only."""
    if not hasattr(socket, "TCP_DEFER_ACCEPT"):
        return
    with contextlib.suppress(OSError):  # some sandboxes define the option without supporting it
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, _DEFER_SECONDS)


def judge(connection: socket.socket, early_refusal: EarlyRefusal) -> Refusal | Promise | None:
    """Judges the whole request that a new connection has sent.

    Returns its refusal, already sent, with the connection closed; or the place promised to it; or None if it
    takes the usual path without either. Unless refused, everything it has sent remains to be read.
    """
    try:
        data = connection.recv(_PEEKED, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except OSError:  # nothing has arrived yet, or the client has disconnected
        return None
    found = early_refusal.judge(data, only=True)
    if isinstance(found, Refusal):
        with connection, contextlib.suppress(OSError):
            connection.recv(len(data), socket.MSG_DONTWAIT)  # closing with unread bytes would reset it
            connection.send(found.answer, socket.MSG_DONTWAIT | _WITH_THE_END)
    return found
