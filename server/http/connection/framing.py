"""HTTP/1.1 messages as bytes, stricter than the parser beneath.

What parsing costs is bounded, and a request whose end two readers could see in different places is refused
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
"""Most that the line and headers of a request may have."""
HEAD_LINES = 256
"""Most lines of a head; each costs some microseconds, however short it is."""
FRAMING_BYTES = 32 * 1024
"""What the chunks of a body may take beside the data in them, and an eighth of the data."""
_CHUNK_FRAMING = 5  # bytes at least: a digit and two line ends
DRAINED_BYTES = 64 * 1024
"""So much of a body is read although its request has been answered; before a longer rest, the connection
ends."""
_HEAD_END = re.compile(rb"\n\r?\n")
_CLOSE = (b"connection", b"close")
_Event = h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]


class TooMuchFraming(h11.RemoteProtocolError):
    """A body of nearly nothing but chunk sizes, extensions or trailers."""


class RequestParser(h11.Connection):
    """One connection's requests and responses.

    ``next_event`` raises ``h11.RemoteProtocolError``, as its base does. It also says ``NEED_DATA`` when a
    turn has parsed as many events as it was given: ``turn_over`` is then true, and ``begin_turn`` goes on.
    """

    def __init__(self) -> None:
        super().__init__(h11.SERVER, HEAD_BYTES)
        self.method = self.path = ""
        """Of the current request, empty before its head is there."""
        self.turn_over = False
        self._events_left = 0
        self._fed = self._body_begin = self._data = self._chunks = 0
        self._declared: int | None = 0  # bytes of the body, None where it comes in chunks
        self._expected_go_ahead = False

    # requests

    @property
    def received(self) -> bytes:
        """What was fed and not parsed yet."""
        return self.trailing_data[0]

    @property
    def in_plain_body(self) -> bool:
        """Whether a body of a declared length comes next."""
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
            self._note(event)
        return event

    def _note(self, event: Any) -> None:
        if isinstance(event, h11.Request):
            self.method = event.method.decode("ascii")
            self.path = unquote(event.target.partition(b"?")[0].decode("ascii"))
            self._declared = _body_length(event)
            self._expected_go_ahead = self.they_are_waiting_for_100_continue
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
        """As the base does. A response before the request's body has come says that the connection ends,
        unless so little is missing that reading it is cheaper than a new connection."""
        if isinstance(event, h11.Response) and _CLOSE not in event.headers and self._leaves_a_body():
            headers = [*event.headers, _CLOSE]
            event = h11.Response(status_code=event.status_code, headers=headers, reason=event.reason)
        return super().send(event)

    def _leaves_a_body(self) -> bool:
        if self.their_state is not h11.SEND_BODY:
            return False
        # a client that waited for "100 Continue" may leave its body out: what comes next can't be told apart
        return (
            self._declared is None or self._expected_go_ahead or self._declared - self._data > DRAINED_BYTES
        )

    @property
    def is_unread(self) -> bool:
        """Whether bytes of a request were left unread, or are likely on their way."""
        return self.their_state in (h11.SEND_BODY, h11.ERROR) or bool(self.received)


def _check_lines(head: bytes) -> None:
    """Before it is parsed, since one large packet can hold all of it."""
    end = _HEAD_END.search(head)
    if head.count(b"\n", 0, end.end() if end else len(head)) > HEAD_LINES:
        raise h11.RemoteProtocolError("too many header lines", error_status_hint=431)


def _body_length(request: h11.Request) -> int | None:
    """Bytes of the body that follows, None where it comes in chunks.

    Raises:
        h11.RemoteProtocolError: where another reader could see its end elsewhere.
    """
    if request.http_version not in (b"1.0", b"1.1"):
        raise h11.RemoteProtocolError("neither HTTP/1.1 nor 1.0")
    lengths = [value for name, value in request.headers if name == b"content-length"]
    chunked = any(name == b"transfer-encoding" for name, _ in request.headers)
    if chunked and (lengths or request.http_version == b"1.0"):
        raise h11.RemoteProtocolError("Transfer-Encoding beside Content-Length, or in HTTP/1.0")
    return None if chunked else int(lengths[0]) if lengths else 0


def refusal(connection: RequestParser, error: ServiceError, dialect: Dialect, request_id: str) -> bytes:
    """A whole response, the connection's last, where no app sees the request."""
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
    if connection.method != "HEAD":  # whose answer has no body
        events.append(h11.Data(data=body))
    events.append(h11.EndOfMessage())
    return b"".join(connection.send(event) or b"" for event in events)
