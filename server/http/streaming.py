"""Streamed responses, server-sent events, and work that is cancelled when the client disconnects."""

from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.concurrency import Interrupted, run_until
from server.errors import ServiceError
from server.http.responses import _log, error_body, note_refusal, request_id
from server.http.route_facts import facts_of

T = TypeVar("T")


class ClientGone(Exception):
    """The client disconnected before the response began."""


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled if the client disconnects first.

    Raises:
        ClientGone
    """
    try:
        return await run_until(disconnected(request.receive), work)
    except Interrupted:
        raise ClientGone from None


async def disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


# Unicode's line ends, at which many clients split the stream: str.splitlines does, and httpx's iter_lines
_LINE_ENDS = {"\u0085": rb"\u0085", "\u2028": rb"\u2028", "\u2029": rb"\u2029"}


def event(data: Mapping[str, Any] | str) -> bytes:
    """Encodes a server-sent event whose data is JSON, or ``data`` itself if it is a string."""
    # runs for every token of every stream: takes a fifth of the standard library encoder's time
    text = data.encode() if isinstance(data, str) else to_json(data, inf_nan_mode="null")
    if not text.isascii():
        for end, escaped in _LINE_ENDS.items():
            text = text.replace(end.encode(), escaped)
    return b"data: %b\n\n" % text


class Stream(Response):
    """A body sent piece by piece at the client's pace. ``close`` is called however it ends.

    A client that reads too slowly is disconnected by ``server.http.connection``.

    Args:
        pieces: the body.
        close: frees the source of the pieces; synchronous, so that no cancellation can prevent it.
        headers: with ``content-length`` where it is known.
    """

    def __init__(
        self, pieces: AsyncGenerator[bytes], close: Callable[[], object], headers: Mapping[str, str]
    ) -> None:
        super().__init__(headers=dict(headers))
        if "content-length" not in headers:
            del self.headers["content-length"]
        self._pieces, self._close = pieces, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(Interrupted, OSError):  # the client has disconnected
            await run_until(disconnected(receive), self._send_all(scope, send), self._close)

    async def _send_all(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._pieces), aclosing(self._guarded(scope)) as pieces:
            async for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _guarded(self, scope: Scope) -> AsyncGenerator[bytes]:
        return self._pieces


class EventStream(Stream):
    """A response of encoded server-sent events; a ``ServiceError`` while streaming becomes the last event."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes], close: Callable[[], object], headers: Mapping[str, str]
    ) -> None:
        super().__init__(events, close, {"X-Accel-Buffering": "no", "Cache-Control": "no-cache", **headers})

    async def _guarded(self, scope: Scope) -> AsyncGenerator[bytes]:
        try:
            async for event_ in self._pieces:
                yield event_
        except ServiceError as error:
            note_refusal(error, scope)
            yield event(error_body(error, facts_of(scope).dialect, request_id(scope)))
        except Exception:
            _log.exception("request %s: a fault while streaming", request_id(scope))
            fault = ServiceError("internal error")
            yield event(error_body(fault, facts_of(scope).dialect, request_id(scope)))
