"""HTTP/1.1 messages as bytes, parsed more strictly than h11 does.

The cost of parsing is bounded, and a request whose end two parsers could place differently is refused
(RFC 9112, sections 6.1 and 6.3).
"""

import json
import re
from typing import Any
from urllib.parse import unquote

import h11

from server.errors import ServiceError
from server.http.responses import error_body, error_headers, error_status
from server.http.route_facts import Dialect

HEAD_BYTES = 32 * 1024
"""Maximum size of a request line and its headers."""
HEAD_LINES = 256
"""Maximum number of lines in a head; each costs some microseconds, however short it is."""
FRAMING_BYTES = 32 * 1024
"""Maximum bytes of chunk framing in a body, plus an eighth of its data."""
_CHUNK_FRAMING = 5  # bytes at least: a digit and two line ends
DRAINED_BYTES = 64 * 1024
"""The rest of an answered request's body is read up to this size; a longer rest ends the connection."""
_HEAD_END = re.compile(rb"\n\r?\n")
_CLOSE = (b"connection", b"close")
_Event = h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]


class TooMuchFraming(h11.RemoteProtocolError):
    """The body consists almost only of chunk sizes, extensions or trailers."""


class RequestParser(h11.Connection):
    """One connection's requests and responses.

    ``next_event`` raises ``h11.RemoteProtocolError``, as its base does. It also returns ``NEED_DATA`` when
    the turn's event budget is used up: ``turn_over`` is then true, and ``begin_turn`` continues.
    """

    def __init__(self) -> None:
        super().__init__(h11.SERVER, HEAD_BYTES)
        self.method = self.path = ""
        """Of the current request; empty until its head has been parsed."""
        self.turn_over = False
        self._events_left = 0
        self._fed = self._body_begin = self._data = self._chunks = 0
        self._declared: int | None = 0  # bytes of the body; None if it is chunked
        self._expected_continue = False

    # requests

    @property
    def received(self) -> bytes:
        """Bytes received and not parsed yet."""
        return self.trailing_data[0]

    @property
    def in_plain_body(self) -> bool:
        """Whether the next bytes belong to a body of a declared length."""
        return self.their_state is h11.SEND_BODY and self._declared is not None

    def begin_turn(self, events: int) -> None:
        self._events_left, self.turn_over = events, False

    def start_next_cycle(self) -> None:
        super().start_next_cycle()
        self.method = self.path = ""

    def receive_data(self, data: bytes) -> None:
        self._fed += len(data)
        super().receive_data(data)

    def next_event(self) -> _Event:
        if self._events_left == 0:
            self.turn_over = True
            return h11.NEED_DATA
        if self.their_state is h11.IDLE:
            _check_lines(self.received)
        event = super().next_event()
        if event is h11.NEED_DATA:
            self._check_framing(self._fed - self._body_begin - self._data)
        elif event is not h11.PAUSED:
            self._events_left -= 1
            self._track(event)
        return event

    def _track(self, event: Any) -> None:
        if isinstance(event, h11.Request):
            self.method = event.method.decode("ascii")
            self.path = unquote(event.target.partition(b"?")[0].decode("ascii"))
            self._declared = _body_length(event)
            self._expected_continue = self.they_are_waiting_for_100_continue
            self._body_begin = self._fed - len(self.received)
            self._data = self._chunks = 0
        elif isinstance(event, h11.Data):
            self._data += len(event.data)
            self._chunks += event.chunk_start
            self._check_framing(self._chunks * _CHUNK_FRAMING)

    def _check_framing(self, framing: int) -> None:
        if self._declared is not None or self.their_state is not h11.SEND_BODY:
            return
        if framing > FRAMING_BYTES + self._data // 8:
            raise TooMuchFraming("the body's chunks are too small")

    # responses

    def send(self, event: Any) -> Any:
        """As the base does. A response sent before the request's body has arrived adds ``Connection: close``,
        unless so little is missing that reading it is cheaper than a new connection."""
        if isinstance(event, h11.Response) and _CLOSE not in event.headers and self._leaves_a_body():
            headers = [*event.headers, _CLOSE]
            event = h11.Response(status_code=event.status_code, headers=headers, reason=event.reason)
        return super().send(event)

    def _leaves_a_body(self) -> bool:
        if self.their_state is not h11.SEND_BODY:
            return False
        # a client that waited for "100 Continue" may omit its body: the next bytes are ambiguous
        return (
            self._declared is None or self._expected_continue or self._declared - self._data > DRAINED_BYTES
        )

    @property
    def is_unread(self) -> bool:
        """Whether bytes of a request are unread, or probably still arriving."""
        return self.their_state in (h11.SEND_BODY, h11.ERROR) or bool(self.received)


def _check_lines(head: bytes) -> None:
    """Called before parsing, since one large packet can hold the whole head."""
    end = _HEAD_END.search(head)
    if head.count(b"\n", 0, end.end() if end else len(head)) > HEAD_LINES:
        raise h11.RemoteProtocolError("too many header lines", error_status_hint=431)


def _body_length(request: h11.Request) -> int | None:
    """Bytes of the body that follows; None if it is chunked.

    Raises:
        h11.RemoteProtocolError: another parser could place its end elsewhere.
    """
    if request.http_version not in (b"1.0", b"1.1"):
        raise h11.RemoteProtocolError("neither HTTP/1.1 nor 1.0")
    lengths = [value for name, value in request.headers if name == b"content-length"]
    chunked = any(name == b"transfer-encoding" for name, _ in request.headers)
    if chunked and (lengths or request.http_version == b"1.0"):
        raise h11.RemoteProtocolError("Transfer-Encoding beside Content-Length, or in HTTP/1.0")
    return None if chunked else int(lengths[0]) if lengths else 0


def refusal(connection: RequestParser, error: ServiceError, dialect: Dialect, request_id: str) -> bytes:
    """The bytes of a whole response, the connection's last, to a request that does not reach the app."""
    body = json.dumps(error_body(error, dialect, request_id)).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        "x-request-id": request_id,
        **error_headers(error),
    }
    status = error_status(error, dialect)
    events: list[h11.Event] = [h11.Response(status_code=status, headers=list(headers.items()))]
    if connection.method != "HEAD":  # the response to HEAD has no body
        events.append(h11.Data(data=body))
    events.append(h11.EndOfMessage())
    return b"".join(connection.send(event) or b"" for event in events)
