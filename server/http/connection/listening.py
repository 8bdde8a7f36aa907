"""Accepting connections: a few per event-loop iteration, and no busy loop when file descriptors run out.

asyncio's own loop accepts all pending connections at once, before any of them can be counted or refused; when
the process has no file descriptor left, it logs each failed attempt and then accepts nothing for a second.
"""

import asyncio
import contextlib
import errno
import logging
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import uvicorn
from uvicorn.config import STARTUP_FAILURE

from server.http.connection.early_refusal import EarlyRefusal
from server.http.connection.new_connection import Listener, NewConnection, defer_accept
from server.http.connection.open_connections import OpenConnections, RateLimited

_AT_ONCE = 16
_EVICTING_AT_ONCE = 4  # an evicted connection keeps its file for some iterations of the event loop
# a refusal costs a fraction of a served connection; more of them wait in the backlog for the next pause's end
_REFUSED_AT_ONCE = 128
_BACKLOG = 2048
_PAUSE_SECONDS = 0.1  # if no connection could be closed to free a descriptor
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_GONE = frozenset({errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.ENETDOWN, errno.EHOSTUNREACH})
_log = logging.getLogger(__name__)


class Acceptor:
    """Accepts from one listening socket until closed. uvicorn treats it like an ``asyncio.Server``."""

    def __init__(
        self,
        listener: socket.socket,
        protocol: Callable[[NewConnection], asyncio.Protocol],
        connections: OpenConnections,
        early_refusal: EarlyRefusal,
    ) -> None:
        self.sockets = (listener,)
        self._listener, self._protocol, self._connections = listener, protocol, connections
        self._refusing = Listener(listener, early_refusal)
        self._loop = asyncio.get_running_loop()
        self._opening: set[asyncio.Task[Any]] = set()
        self._warnings = RateLimited()
        self._retry: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._listener.setblocking(False)
        self._listener.listen(_BACKLOG)
        self._watch()

    def _watch(self) -> None:
        self._retry = None
        self._loop.add_reader(self._listener.fileno(), self._accept_batch)

    def _accept_batch(self) -> None:
        left = _AT_ONCE if self._connections.room > len(self._opening) + _AT_ONCE else _EVICTING_AT_ONCE
        for _ in range(_REFUSED_AT_ONCE):
            try:
                accepted = self._refusing.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._wait_for_a_file(error)
                    return
                if error.errno not in _GONE:
                    raise
            else:
                if accepted is None:
                    continue
                self._begin(accepted)
                if (left := left - 1) == 0:
                    return

    def _begin(self, accepted: NewConnection) -> None:
        opening = self._loop.connect_accepted_socket(lambda: self._protocol(accepted), accepted.socket)
        task = self._loop.create_task(opening)
        self._opening.add(task)
        task.add_done_callback(lambda task: self._opened(task, accepted))

    def _opened(self, task: "asyncio.Task[Any]", accepted: NewConnection) -> None:
        self._opening.discard(task)
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is None:
            return
        accepted.socket.close()
        if accepted.promise is not None:
            accepted.promise.release()
        if isinstance(error, Exception):
            self._warnings.warning("a connection could not be opened: %s", error)

    def _wait_for_a_file(self, error: OSError) -> None:
        """Leaves new connections in the backlog until a descriptor is free, or for ``_PAUSE_SECONDS``."""
        self._warnings.warning("no connection can be accepted now: %s", error.strerror)
        if not self._connections.free_a_file():
            self._loop.remove_reader(self._listener.fileno())
            self._retry = self._loop.call_later(_PAUSE_SECONDS, self._watch)

    def close(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
        self._loop.remove_reader(self._listener.fileno())
        self._listener.close()

    async def wait_closed(self) -> None:
        await asyncio.gather(*self._opening, return_exceptions=True)


class Server(uvicorn.Server):
    """uvicorn's server with its own ``Acceptor`` per socket; ``config`` is a ``ServerConfig``."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens on the configured address, or on the given bound sockets.

        Raises:
            SystemExit: the address can't be bound, or the app did not start.
        """
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            sys.exit(STARTUP_FAILURE)
        try:
            listeners = await self._listeners(sockets)
        except OSError as error:
            _log.error("%s", error)
            await self.lifespan.shutdown()
            sys.exit(STARTUP_FAILURE)
        early_refusal: EarlyRefusal = self.config.early_refusal  # type: ignore[attr-defined]
        acceptors = [Acceptor(one, self._protocol, self._connections, early_refusal) for one in listeners]
        for acceptor in acceptors:
            acceptor.start()
        self.servers = acceptors  # type: ignore[assignment]
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Waits for running requests and unsent responses; aborts lingering connections."""
        await super().shutdown(sockets)
        self._connections.abort_lingering()
        await asyncio.sleep(0)  # their connection_lost runs in the loop's next iteration

    @property
    def _connections(self) -> OpenConnections:
        connections: OpenConnections = self.config.connections  # type: ignore[attr-defined]
        return connections

    def _protocol(self, accepted: NewConnection) -> asyncio.Protocol:
        protocol: Any = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        protocol.promise, protocol.begun = accepted.promise, accepted.begun
        return cast(asyncio.Protocol, protocol)

    async def _listeners(self, sockets: Sequence[socket.socket] | None) -> list[socket.socket]:
        if sockets is not None:
            return [one.dup() for one in sockets]
        bound = await asyncio.get_running_loop().create_server(
            asyncio.Protocol, self.config.host, self.config.port, start_serving=False
        )
        with contextlib.closing(bound):
            listeners = [one.dup() for one in bound.sockets]
        for listener in listeners:
            defer_accept(listener)
        return listeners
