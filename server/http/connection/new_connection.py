"""Requests that are refused as their connection is accepted, before it costs a protocol or a timer."""

import contextlib
import socket

from server.http.admission.promised_places import Promise
from server.http.connection.early_refusal import EarlyRefusal, Refusal

_PEEKED = 16 * 1024  # a request that is longer goes the usual way
_DEFER_SECONDS = 1
# the answer and the connection's end leave in one packet, and wake the client once
_WITH_THE_END = getattr(socket, "MSG_MORE", 0)


def defer_accept(listener: socket.socket) -> None:
    """Connections wait in the kernel until they have sent something, or for a second; Linux only."""
    if not hasattr(socket, "TCP_DEFER_ACCEPT"):
        return
    with contextlib.suppress(OSError):  # some sandboxes know it and don't have it
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, _DEFER_SECONDS)


def judge(connection: socket.socket, early_refusal: EarlyRefusal) -> Refusal | Promise | None:
    """Of the whole request that this new connection has sent: its refusal, sent already and the connection
    closed, or the place promised to it.

    None if it goes the usual way without either. Unless refused, all that it has sent is still to be read.
    """
    try:
        data = connection.recv(_PEEKED, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except OSError:  # nothing has come yet, or it is gone
        return None
    found = early_refusal.judge(data, only=True)
    if isinstance(found, Refusal):
        with connection, contextlib.suppress(OSError):
            connection.recv(len(data), socket.MSG_DONTWAIT)  # closed with something unread, it would be reset
            connection.send(found.answer, socket.MSG_DONTWAIT | _WITH_THE_END)
    return found
