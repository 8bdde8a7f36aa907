"""HTTP connections that cost a bounded time: slow senders and readers that stop are cut off.

The server beneath bounds only idle connections. Here the head of a request (its line and headers) must come
within the receive timeout and in so many bytes. A reader must take something of what was sent to it within
that time, and an answer waits for its reader no longer than the request timeout in all. The body has a limit
of its own (``server.middleware``).
"""

import asyncio
import json
import sys
import uuid
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from server.errors import BadRequest, HeadersTooLarge, RequestTimeout, ServiceError
from server.reader_clock import ReaderClock
from server.replies import error_body
from server.settings import Settings

HEAD_BYTES = 32 * 1024
"""Most that the line and headers of a request may have."""
KEEP_ALIVE_SECONDS = 30
_SLICE = 4096  # judged this many bytes at a time, or one large packet would pass the limit whole
_CAN_ANSWER = (h11.IDLE, h11.SEND_RESPONSE)


class ServerConfig(uvicorn.Config):
    """How every server of the app listens, in production and in tests."""

    def __init__(self, app: FastAPI, settings: Settings, **others: Any) -> None:
        super().__init__(
            app,
            host=settings.host,
            port=settings.port,
            http=Connection,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="on",
            h11_max_incomplete_event_size=HEAD_BYTES,
            **{"timeout_keep_alive": KEEP_ALIVE_SECONDS, "timeout_graceful_shutdown": 1, **others},
        )
        self.receive_timeout = settings.receive_timeout
        self.reading_timeout = max(settings.request_timeout, settings.receive_timeout)


class Connection(H11Protocol):
    """One client's connection, with a clock on what it sends and on what it reads."""

    def __init__(
        self,
        config: ServerConfig,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._patience = config.receive_timeout
        self._head_timer: asyncio.TimerHandle | None = None
        self._in_all = config.reading_timeout
        self._reader: ReaderClock

    # the sender

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._reader = ReaderClock(transport, self._patience, self._in_all)
        self._time_head()

    def data_received(self, data: bytes) -> None:
        for at in range(0, len(data), _SLICE):
            if self.transport.is_closing():
                break
            super().data_received(data[at : at + _SLICE])
        self._time_head()

    def _time_head(self) -> None:
        """The clock runs from the first byte, or the connection's begin, until a request's head is there.

        It runs too while the rest of a body comes whose request has already been answered.
        """
        if self._answering or self.transport.is_closing():
            self._stop_head_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self._patience, self._head_is_late)

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        begun, _ = self.conn.trailing_data
        if begun and self.conn.our_state is h11.IDLE:
            self._refuse(RequestTimeout("the request took too long to arrive"))
        else:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Called where the request is no HTTP; answers as every other refusal is answered."""
        fault = sys.exception()
        if isinstance(fault, h11.RemoteProtocolError) and fault.error_status_hint == HeadersTooLarge.status:
            self._refuse(HeadersTooLarge(f"line and headers may have {HEAD_BYTES} bytes"))
        else:
            self._refuse(BadRequest("the request is not valid HTTP"))

    def _refuse(self, error: ServiceError) -> None:
        """An answer from here, where no app sees the request; then the end of the connection."""
        if self.conn.our_state in _CAN_ANSWER:
            path = self.scope["path"] if self._answering else ""
            self.transport.write(self._refusal(error, path))
        if self.cycle is not None:  # the app may be at work on this very request: nobody hears it any more
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _refusal(self, error: ServiceError, path: str) -> bytes:
        id_ = uuid.uuid4().hex
        body = json.dumps(error_body(error, path, id_)).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            "x-request-id": id_,
        }
        events: list[h11.Event] = [
            h11.Response(status_code=error.status, headers=list(headers.items())),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ]
        return b"".join(self.conn.send(event) or b"" for event in events)

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
        super().on_response_complete()
        self._reader.stop()
        self._reader.watch(self.cycle)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._reader.stop()
        super().connection_lost(exc)
