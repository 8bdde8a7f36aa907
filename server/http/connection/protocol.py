"""HTTP connections that cost a bounded time: slow senders and readers that stop are cut off.

uvicorn bounds only idle connections. Here the head of a request (its line and headers) must arrive within the
receive timeout and within ``HEAD_BYTES``. A client must read something of a response within that time, and
the pauses of a response together may last no longer than the request timeout. The body has its own limit
(``server.http.middleware``).

A request that is refused by its head is answered unparsed (``refusing_protocol``). Other input is parsed in
turns (``turns``) by a parser with bounded cost (``framing``). A connection that ends while its client is
sending lingers (``linger``); an idle one may be evicted for a new one (``open_connections``).
"""

import asyncio
import sys
from typing import TYPE_CHECKING, Any

import h11
from uvicorn.server import ServerState

from server.errors import BadRequest, HeadersTooLarge, NotReady, RequestTimeout, ServiceError
from server.http.connection.framing import HEAD_BYTES, HEAD_LINES, TooMuchFraming, refusal
from server.http.connection.linger import Linger, LingeringTransport
from server.http.connection.open_connections import Stage
from server.http.connection.reader_clock import HeadClock, ReaderClock
from server.http.connection.refusing_protocol import RefusingProtocol
from server.http.connection.turns import FIRST_EVENTS, ReadFlow
from server.http.request_id import new_request_id
from server.http.responses import error_status

if TYPE_CHECKING:
    from server.http.server_config import ServerConfig

_SLICE = 4096  # parsed this many bytes at a time, or one large packet would pass the limits whole
_CAN_ANSWER = (h11.IDLE, h11.SEND_RESPONSE)


class Connection(RefusingProtocol):
    """One client's connection, with timeouts on what it sends and on what it reads."""

    def __init__(
        self,
        config: "ServerConfig",
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._turns, self._open = config.turns, config.connections
        self._refused = False
        self._receive_timeout = config.receive_timeout
        self._head = HeadClock(self.loop, self._receive_timeout, self._head_is_late)
        self._reading_timeout = config.reading_timeout
        self.begun = b""
        """What was read from the socket as it was accepted."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(LingeringTransport(transport, self._must_linger, self._linger))
        self.flow = ReadFlow(self.transport, self._read_on)
        self._reader = ReaderClock(self.transport, self._receive_timeout, self._reading_timeout)
        if self._open.admit(self):
            self._update_stage()
            self._time_head()
            if self.begun:
                self.data_received(self.begun)
        else:
            self._refuse(NotReady("as many connections as the server may have are at work"))

    # what arrives is parsed in turns

    def data_received(self, data: bytes) -> None:
        data = self._refuse_early(self._skip(data) if self._skipping else data)
        if not data:
            self._update_stage()
            return
        self._at_start = False
        self._unset_keepalive_if_required()
        self._unparsed += data
        if self in self._turns:
            self.transport.pause_reading()
        else:
            self.take_turn(FIRST_EVENTS)

    def take_turn(self, events: int) -> None:
        if not self.transport.is_closing():
            self.conn.begin_turn(events)
            self.handle_events()
            self._update_stage()
            self._time_head()

    def handle_events(self) -> None:
        """Parses until the turn is over, a pipelined request has to wait, or everything is parsed."""
        super().handle_events()
        while self._unparsed and not (
            self.conn.turn_over or self.flow.read_paused or self.transport.is_closing()
        ):
            # a body of a declared length costs nothing to parse, whatever its size
            piece = len(self._unparsed) if self.conn.in_plain_body else _SLICE
            self.conn.receive_data(bytes(self._unparsed[:piece]))
            del self._unparsed[:piece]
            super().handle_events()
        if self.transport.is_closing():
            self._unparsed.clear()
        elif self.conn.turn_over or self._unparsed:
            self.transport.pause_reading()
            if self.conn.turn_over:
                self._turns.add(self)
        elif not self.flow.read_paused:
            self.transport.resume_reading()

    def _read_on(self) -> None:
        """Resumes reading when requests and bodies permit it; input read before is parsed first."""
        if self._unparsed or self.conn.turn_over:
            self._turns.add(self)
        else:
            self.transport.resume_reading()

    def _update_stage(self) -> None:
        """Records what the connection waits for now."""
        stage = self._stage()
        self._open.set_stage(self, stage)
        if stage is Stage.RECEIVING:
            self._time_head()

    def _stage(self) -> Stage:
        if self._at_start:
            return Stage.RECEIVING if self._skipping else Stage.IDLE
        if self._answering and not self.cycle.more_body:
            return Stage.BUSY
        arriving = self._answering or self._unparsed or self.conn.is_unread or self._skipping
        return Stage.RECEIVING if arriving else Stage.IDLE

    # the sender

    def _time_head(self) -> None:
        """The clock runs from the first byte, or the start of the connection, until a head has arrived.

        It also runs while the rest of the body of an answered request arrives.
        """
        if self._answering or self.transport.is_closing():
            self._head.stop()
        else:
            self._head.start()

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _head_is_late(self) -> None:
        if self.conn.received and self.conn.our_state is h11.IDLE:
            self._refuse(RequestTimeout("the request took too long to arrive"))
        else:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn when the request is not valid HTTP; refuses it in the server's own format."""
        fault = sys.exception()
        if isinstance(fault, TooMuchFraming):
            self._refuse(BadRequest(str(fault)))
        elif isinstance(fault, h11.RemoteProtocolError) and fault.error_status_hint == HeadersTooLarge.status:
            self._refuse(
                HeadersTooLarge(f"line and headers may have {HEAD_BYTES} bytes and {HEAD_LINES} lines")
            )
        else:
            self._refuse(BadRequest("the request is not valid HTTP"))

    def _refuse(self, error: ServiceError) -> None:
        """Answers a request that does not reach the app, then closes the connection."""
        if self.conn.our_state in _CAN_ANSWER:
            self._answer(error)
        if self.cycle is not None:  # the app may be serving this request: its response is no longer read
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._refused = True
        self._release_promise()
        self.transport.close()

    def _answer(self, error: ServiceError) -> None:
        id_ = new_request_id()
        scope = {"method": self.conn.method or "-", "path": self.conn.path, "state": {"request_id": id_}}
        dialect = self._early_refusal.routes.of(scope).dialect
        self.transport.write(refusal(self.conn, error, dialect, id_))
        self._early_refusal.log.add(scope, error, error_status(error, dialect), 0.0)

    # the reader

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reader.watch(self.cycle)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._reader.stop()
        if self.transport.is_closing() or not self._answering:
            self._reader.watch(self.cycle)

    def on_response_complete(self) -> None:
        self._release_promise()
        super().on_response_complete()
        self._reader.stop()
        self._reader.watch(self.cycle)
        self._update_stage()

    def _should_upgrade(self) -> bool:
        return False  # uvicorn's also logs two warnings per request; some clients always offer h2c

    # the end

    def evict(self) -> None:
        """Closes the connection to make room. A client that is sending a request receives a 503."""
        if self.transport.is_closing() or self.transport.get_write_buffer_size():
            self.transport.abort()  # closing would wait until the client has read its last response
        elif self._stage() is Stage.RECEIVING and not self._skipping:
            self._refuse(NotReady("the server needs this connection for others"))
        else:
            self.transport.close()

    def abort(self) -> None:
        self.transport.abort()

    def shutdown(self) -> None:
        if not self.transport.is_closing():
            super().shutdown()

    def _must_linger(self) -> bool:
        return self._refused or bool(self._unparsed or self._skipping) or self.conn.is_unread

    def _linger(self) -> None:
        """Lets the connection linger; shutdown doesn't wait for it."""
        self._release_promise()
        self._head.stop()
        self._unset_keepalive_if_required()
        self._unparsed.clear()
        self._open.linger(self)
        transport = self.transport.inner  # type: ignore[attr-defined]
        Linger(transport, self, self._receive_timeout, lambda: self.connections.discard(self)).begin()

    def connection_lost(self, exc: Exception | None) -> None:
        self._open.remove(self)
        self._release_promise()
        self._head.stop()
        self._reader.stop()
        super().connection_lost(exc)
