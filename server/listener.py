"""Listening sockets that refuse by themselves, before a connection costs a protocol, a task or a timer."""

import asyncio
import contextlib
import socket
from typing import Any

from server.early_refusal import EarlyRefusal, Refusal
from server.promised_places import Promise

_REFUSED_PER_TURN, _ACCEPTED_PER_TURN = 64, 16
_PEEKED = 16 * 1024  # a request that is longer goes the usual way
_DEFER_SECONDS = 1  # Linux: a connection is accepted when it has sent something, or after this time


class Listener(socket.socket):
    """A listening TCP socket whose ``accept`` answers and closes what is refused.

    It does so where the whole request is there already; all others are accepted as ever. In one turn of the
    event loop it accepts so many and no more: the tokens of running streams are sent in between.

    Args:
        family: ``socket.AF_INET`` or ``socket.AF_INET6``.
        early_refusal: finds the answers.
    """

    def __init__(self, family: int, early_refusal: EarlyRefusal) -> None:
        super().__init__(family, socket.SOCK_STREAM)
        self._early_refusal = early_refusal
        self._left = _ACCEPTED_PER_TURN

    def accept(self) -> tuple[socket.socket, object]:
        """A connection to be served.

        Raises:
            BlockingIOError: there is none now, or enough were accepted in this turn of the event loop.
        """
        if self._left == _ACCEPTED_PER_TURN:
            asyncio.get_running_loop().call_soon(self._next_turn)
        for _ in range(_REFUSED_PER_TURN):
            if not self._left:
                break
            connection, address = super().accept()
            if not refuse_accepted(connection, address, self._early_refusal):
                self._left -= 1
                return connection, address
        self._left = 0
        raise BlockingIOError

    def _next_turn(self) -> None:
        self._left = _ACCEPTED_PER_TURN


def refuse_accepted(connection: socket.socket, address: Any, early_refusal: EarlyRefusal) -> bool:
    """Whether the request on this new connection was answered here and the connection closed.

    If not, all that it has sent is still to be read, and a place may be promised to it.
    """
    try:
        data = connection.recv(_PEEKED, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except OSError:  # nothing has come yet, or it is gone
        return False
    found = early_refusal.judge(data, only=True)
    if isinstance(found, Promise):
        early_refusal.arriving.put((address[0], address[1]), found)
    if not isinstance(found, Refusal):
        return False
    with connection, contextlib.suppress(OSError):
        connection.recv(len(data), socket.MSG_DONTWAIT)  # closed with something unread, it would be reset
        connection.send(found.answer, socket.MSG_DONTWAIT)
    return True


async def listen(host: str, port: int, early_refusal: EarlyRefusal) -> list[socket.socket]:
    """One socket for every address of ``host``, bound.

    Raises:
        OSError: an address can't be had.
    """
    found = await asyncio.get_running_loop().getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    listeners: list[socket.socket] = []
    try:
        for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
            listener = Listener(family, early_refusal)
            listeners.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if hasattr(socket, "TCP_DEFER_ACCEPT"):
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, _DEFER_SECONDS)
            listener.bind(address)
    except OSError:
        for opened in listeners:
            opened.close()
        raise
    return listeners
