"""A client of little overhead, since it shares the server's CPU. One connection per request."""

import asyncio
import json
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

from server.bench.errors import BenchError

_END_OF_HEAD, _END_OF_LINE, _END_OF_EVENT = b"\r\n\r\n", b"\r\n", b"\n\n"
_TIMEOUT = 300.0  # seconds for one request


@dataclass
class Answer:
    """A stream as it arrived. Times are ``time.perf_counter()`` seconds."""

    sent: float
    arrivals: list[float] = field(default_factory=list)
    """Of each event that carried a token."""
    error: str | None = None
    """Set after a status other than 200, an error event, or a broken connection."""
    last: dict[str, Any] = field(default_factory=dict)
    """The last event."""

    @property
    def ttft(self) -> float:
        """Seconds from before connecting to the first token."""
        return self.arrivals[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in pairwise(self.arrivals)]


class Reply(asyncio.Protocol):
    """Parses an HTTP response as it arrives: head, chunks, server-sent events."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._raw, self._text = bytearray(), bytearray()
        self._chunked: bool | None = None  # None until the head is complete
        self.status = 0
        self.arrivals: list[float] = []
        self.last_event = b""
        self.whole = False
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def body(self) -> bytes:
        """The body, without events."""
        return bytes(self._text)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self._raw += data
        if self._chunked is None and not self._parse_head():
            return
        if self._chunked:
            self._parse_chunks()
        else:
            self._text += self._raw
            self._raw.clear()
        self._parse_events(now)

    def connection_lost(self, error: Exception | None) -> None:
        if self._chunked is False and error is None:
            self.whole = True  # it ends with the connection
        if not self.ended.done():
            self.ended.set_result(None)

    def _parse_head(self) -> bool:
        end = self._raw.find(_END_OF_HEAD)
        if end < 0:
            return False
        status, *headers = bytes(self._raw[:end]).split(_END_OF_LINE)
        self.status = int(status.split()[1])
        self._chunked = any(h.lower().replace(b" ", b"") == b"transfer-encoding:chunked" for h in headers)
        del self._raw[: end + len(_END_OF_HEAD)]
        return True

    def _parse_chunks(self) -> None:
        while (end := self._raw.find(_END_OF_LINE)) >= 0:
            size, start = int(self._raw[:end].split(b";")[0], 16), end + 2
            if len(self._raw) < start + size + 2:
                return
            self._text += self._raw[start : start + size]
            del self._raw[: start + size + 2]
            if size == 0:
                self.whole = True
                if not self.ended.done():
                    self.ended.set_result(None)
                return

    def _parse_events(self, now: float) -> None:
        while (end := self._text.find(_END_OF_EVENT)) >= 0:
            event = bytes(self._text[:end])
            del self._text[: end + 2]
            if event.startswith(b"data:"):
                self.last_event = event[5:]
                self.arrivals.append(now)


class Client:
    """Requests to one server.

    Args:
        url: such as ``http://127.0.0.1:8080``.
        key: sent as a Bearer token, if given.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme != "http" or not parts.hostname:
            raise BenchError(f"{url!r} is not an address such as http://127.0.0.1:8080")
        self.url = url
        self._host, self._port, self._root = parts.hostname, parts.port or 80, parts.path.rstrip("/")
        self._key = f"Authorization: Bearer {key}\r\n" if key else ""

    async def stream(self, text: str, tokens: int, precision: str | None) -> Answer:
        """Continues the text greedily by exactly ``tokens`` tokens; errors are in the answer, not raised."""
        body = {
            "inputs": text,
            "parameters": {"max_new_tokens": tokens, "ignore_eos": True},
            **({"precision": precision} if precision else {}),
        }
        answer = Answer(time.perf_counter())
        try:
            reply = await self._exchange("POST", "/generate_stream", body)
        except (OSError, TimeoutError) as error:
            answer.error = type(error).__name__
            return answer
        return _read(answer, reply, tokens)

    async def ask(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON of an answer.

        Raises:
            BenchError: no answer, or one that isn't 200.
        """
        try:
            reply = await self._exchange(method, path, body)
        except (OSError, TimeoutError) as error:
            raise BenchError(f"{self.url}{path} can't be reached ({type(error).__name__})") from error
        if reply.status != 200:
            raise BenchError(f"{self.url}{path} answered {reply.status}: {reply.body[:200]!r}")
        return json.loads(reply.body)

    async def _exchange(self, method: str, path: str, body: Any) -> Reply:
        content = b"" if body is None else json.dumps(body).encode()
        head = (
            f"{method} {self._root}{path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n{self._key}"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        )
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(_TIMEOUT):
            transport, reply = await loop.create_connection(
                lambda: Reply(head.encode() + content), self._host, self._port
            )
            try:
                await reply.ended
            finally:
                transport.close()
        return reply


def _read(answer: Answer, reply: Reply, tokens: int) -> Answer:
    if reply.status != 200:
        answer.error = f"status {reply.status}" if reply.status else "no answer"
        return answer
    answer.arrivals = reply.arrivals
    answer.last = json.loads(reply.last_event or b"{}")
    if "error" in answer.last:
        answer.arrivals = answer.arrivals[:-1]
        answer.error = f"while streaming: {answer.last.get('error_type', 'error')}"
    elif not reply.whole:
        answer.error = "the connection broke"
    elif len(answer.arrivals) != tokens:
        answer.error = f"{len(answer.arrivals)} tokens instead of {tokens}"
    return answer
