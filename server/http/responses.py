"""How answers leave: errors in both dialects, event streams, and work that ends when its client goes."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from server.errors import ServiceError
from server.http.retry_after import retry_after

T = TypeVar("T")
_log = logging.getLogger("server")


class ClientGone(Exception):
    """Nobody is there any more to answer."""


def is_openai(path: str) -> bool:
    return path == "/v1" or path.startswith("/v1/") or (path.startswith("/models/") and "/v1/" in path)


_OPENAI_NAMES = {"inputs": "prompt", "max_new_tokens": "max_tokens", "truncate": "truncate_prompt_tokens"}
_CHAT_NAMES = {**_OPENAI_NAMES, "inputs": "messages"}


def error_body(error: ServiceError, path: str, request_id: str) -> dict[str, Any]:
    """The body that tells of ``error`` in the dialect of ``path``, whose names for fields it uses."""
    if is_openai(path):
        names = _CHAT_NAMES if path.endswith("/chat/completions") else _OPENAI_NAMES
        param = names.get(error.param or "", error.param)
        message = error.message
        if message.startswith(prefix := f"{error.param}: "):
            message = f"{param}: {message.removeprefix(prefix)}"
        kind, code = error.openai_type, error.openai_code
        return {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return {"error": error.message, "error_type": error.error_type, "request_id": request_id}


def error_response(
    error: ServiceError, scope: Scope, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    path = scope["path"]
    note_refusal(error, scope)
    out = {**(headers or {}), **error_headers(error)}
    return JSONResponse(error_body(error, path, request_id(scope)), error_status(error, path), out)


def error_status(error: ServiceError, path: str) -> int:
    """The status that ``error`` has in the dialect of ``path``."""
    return (error.openai_status if is_openai(path) else None) or error.status


def error_headers(error: ServiceError) -> dict[str, str]:
    """What an error's answer has beside the headers of every answer."""
    out = {}
    if error.status == 401:
        out["WWW-Authenticate"] = "Bearer"
    if (seconds := retry_after(error)) is not None:
        out["Retry-After"] = str(seconds)
    if error.should_retry is not None:
        out["x-should-retry"] = str(error.should_retry).lower()
    return out


def note_refusal(error: ServiceError, scope: Scope) -> None:
    """For the access log, on one line; messages hold no prompt."""
    message = "".join(c if c.isprintable() else "\ufffd" for c in error.message)
    scope.setdefault("state", {})["refusal"] = f"{error.error_type}: {message}"


def request_id(scope: Scope) -> str:
    return str(scope.get("state", {}).get("request_id", ""))


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled if the client goes first.

    Raises:
        ClientGone
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
    except BaseException:
        await cancelled(task, gone)
        raise
    gone.cancel()  # not awaited: a cancellation here would lose what the work has brought
    return task.result()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancelled(*tasks: asyncio.Future[Any]) -> None:
    """Cancels them and waits for their end; what they raise is not told."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# Unicode's line ends, which many clients take for the stream's: str.splitlines does, and httpx's iter_lines
_LINE_ENDS = {"\u0085": rb"\u0085", "\u2028": rb"\u2028", "\u2029": rb"\u2029"}


def event(data: Mapping[str, Any] | str) -> bytes:
    """A server-sent event of JSON, or of a word."""
    # for every token of every stream: a fifth of what the standard library's encoder takes
    text = data.encode() if isinstance(data, str) else to_json(data, inf_nan_mode="null")
    if not text.isascii():
        for end, escaped in _LINE_ENDS.items():
            text = text.replace(end.encode(), escaped)
    return b"data: %b\n\n" % text


class Stream(Response):
    """A body sent piece by piece, as its reader takes it. However it ends, ``close`` is called.

    A reader that stops reading, or is too slow, is cut off by its connection.

    Args:
        pieces: the body.
        close: frees what the pieces come from; it doesn't wait, so that no cancellation can prevent it.
        headers: with the content's length where it is known.
    """

    def __init__(
        self, pieces: AsyncGenerator[bytes], close: Callable[[], object], headers: Mapping[str, str]
    ) -> None:
        super().__init__(headers=dict(headers))
        if "content-length" not in headers:
            del self.headers["content-length"]
        self._pieces, self._close = pieces, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send_all(scope, send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                with suppress(OSError):  # the reader left
                    sending.result()
        finally:
            self._close()  # before anything is awaited
            await cancelled(sending, gone)

    async def _send_all(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._pieces), aclosing(self._guarded(scope)) as pieces:
            async for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _guarded(self, scope: Scope) -> AsyncGenerator[bytes]:
        return self._pieces


class EventStream(Stream):
    """Server-sent events, each already encoded; a ``ServiceError`` raised by them becomes the last one."""

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
            yield event(error_body(error, scope["path"], request_id(scope)))
        except Exception:
            _log.exception("request %s: a fault while streaming", request_id(scope))
            yield event(error_body(ServiceError("internal error"), scope["path"], request_id(scope)))
