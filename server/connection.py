"""HTTP connections that cost a bounded time: slow senders and readers that stop are cut off.

The server beneath bounds only idle connections. Here the head of a request (its line and headers) must come
within the receive timeout and in so many bytes, and a reader must take something of what was sent to it
within that time. The body has a limit of its own (``server.middleware``).
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

from server.early_refusal import EarlyRefusal, Refusal
from server.errors import BadRequest, HeadersTooLarge, RequestTimeout, ServiceError
from server.promised_places import Promise
from server.replies import error_body
from server.settings import Settings

HEAD_BYTES = 32 * 1024
"""Most that the line and headers of a request may have."""
KEEP_ALIVE_SECONDS = 30
_SLICE = 4096  # judged this many bytes at a time, or one large packet would pass the limit whole
_CAN_ANSWER = (h11.IDLE, h11.SEND_RESPONSE)


def early_refusal_of(app: FastAPI, settings: Settings) -> EarlyRefusal:
    """The app's, with traces where a collector is configured."""
    if settings.otlp_endpoint is None:
        return EarlyRefusal(app.state.admission, settings)
    from server.tracing import trace_context  # needs an extra

    return EarlyRefusal(app.state.admission, settings, trace_context)


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
        self.early_refusal = early_refusal_of(app, settings)


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
        self._reader_timer: asyncio.TimerHandle | None = None
        self._unsent = 0
        self.app_state = dict(app_state)
        self._early_refusal = config.early_refusal
        self._skipping = 0  # bytes of a refused request's body that have not come yet
        self._ends_after_body = False

    # the sender

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if (promise := self._early_refusal.arriving.take(self.client)) is not None:
            self.app_state["promise"] = promise
        self._time_head()

    def data_received(self, data: bytes) -> None:
        data = self._refuse_early(self._skip(data))
        for at in range(0, len(data), _SLICE):
            if self.transport.is_closing():
                break
            super().data_received(data[at : at + _SLICE])
        if data or self._skipping:
            self._time_head()
        else:
            self._stop_head_timer()

    def _refuse_early(self, data: bytes) -> bytes:
        """Answers what is refused for its head alone, below HTTP's state machine; returns the rest of data.

        One request a call: those that come behind it in the same packet go the usual way, one after another.
        """
        judged = "promise" in self.app_state or not self._between_requests
        found = self._early_refusal.judge(data) if data and not judged else None
        if isinstance(found, Promise):
            self.app_state["promise"] = found  # the request's scope gets a copy
        if not isinstance(found, Refusal):
            return data
        self._stop_head_timer()
        self.transport.write(found.answer)
        self._skipping, self._ends_after_body = found.body_bytes, found.close
        self.on_response_complete()
        return self._skip(data[found.head_bytes :])

    def _release_promise(self) -> None:
        promise: Promise | None = self.app_state.pop("promise", None)
        if promise is not None:
            promise.release()

    def _skip(self, data: bytes) -> bytes:
        """Drops what belongs to the body of a request that has been refused."""
        skipped = min(self._skipping, len(data))
        self._skipping -= skipped
        if self._ends_after_body and not self._skipping:
            self.transport.close()
            return b""
        return data[skipped:]

    @property
    def _between_requests(self) -> bool:
        """Whether the next byte is the first of a request."""
        answered = self.cycle is None or self.cycle.response_complete
        states = (self.conn.our_state, self.conn.their_state)
        return answered and states == (h11.IDLE, h11.IDLE) and not self.conn.trailing_data[0]

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
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_reader_timer()
        if self.transport.is_closing() or not self._answering:
            self._watch_reader()

    def on_response_complete(self) -> None:
        self._release_promise()
        super().on_response_complete()
        self._stop_reader_timer()
        self._watch_reader()

    def _watch_reader(self) -> None:
        """Closing waits until all is sent, so that a reader which stopped would keep it open for ever."""
        self._unsent = self.transport.get_write_buffer_size()
        if self._unsent and self._reader_timer is None:
            self._reader_timer = self.loop.call_later(self._patience, self._check_reader)

    def _check_reader(self) -> None:
        self._reader_timer = None
        if 0 < self._unsent <= self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self._watch_reader()

    def _stop_reader_timer(self) -> None:
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._release_promise()
        self._stop_head_timer()
        self._stop_reader_timer()
        super().connection_lost(exc)
