"""One HTTP request as data, and an ASGI app's exchange with it."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Scope

Headers = list[tuple[bytes, bytes]]
_running: set[asyncio.Task[None]] = set()  # the event loop's references to tasks are weak


@dataclass(frozen=True)
class Forwarded:
    """A request with its whole body, as the router passes it on.

    Args:
        path: without the prefix of the application.
        prompt: the beginning of its text, by which ``server.ray.affinity`` chooses a replica.
    """

    method: str
    path: str
    query: bytes
    headers: Headers
    body: bytes = b""
    prompt: str = ""

    def scope(self) -> Scope:
        """The ASGI scope of a connection."""
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "scheme": "http",
            "method": self.method,
            "path": self.path,
            "raw_path": self.path.encode(),
            "root_path": "",
            "query_string": self.query,
            "headers": self.headers,
            "client": None,
            "server": None,
        }

    def request(self, app: Starlette) -> Request:
        """The request as the app's routes read it."""

        async def receive() -> Message:
            return {"type": "http.request", "body": self.body, "more_body": False}

        return Request({**self.scope(), "app": app}, receive)


@dataclass(frozen=True)
class Head:
    """The first item of a response: with what came of its body at once, often all."""

    status: int
    headers: Headers
    body: bytes
    ended: bool
    """Nothing follows: the client need not wait until the replica's call has ended, too."""


@dataclass(frozen=True)
class Whole:
    """A response with its whole body."""

    status: int
    headers: Headers
    body: bytes


async def exchange(app: ASGIApp, request: Forwarded) -> AsyncGenerator[Head | bytes]:
    """The app's response, in pieces as they come.

    Closing the generator early, or cancelling it, is the client's disconnect: the app notices it where it
    awaits one, and frees what the request holds.

    Raises:
        Exception: the app failed before or within its response.
    """
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    body = [request.body]
    gone = asyncio.Event()

    async def receive() -> Message:
        if body:
            return {"type": "http.request", "body": body.pop(), "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        messages.put_nowait(message)

    async def run() -> None:
        try:
            await app(request.scope(), receive, send)
        finally:
            messages.put_nowait(None)

    task = asyncio.create_task(run())
    _running.add(task)
    task.add_done_callback(_running.discard)
    try:
        start = await messages.get()
        if start is not None:
            first, ended = _available(messages)
            headers = [(bytes(name), bytes(value)) for name, value in start["headers"]]
            yield Head(start["status"], headers, first, ended)
            while not ended:
                message = await messages.get()
                if message is None:
                    break
                more, ended = _available(messages)
                if piece := message["body"] + more:
                    yield piece
        await task
    finally:
        gone.set()


def _available(messages: "asyncio.Queue[Message | None]") -> tuple[bytes, bool]:
    """The body's bytes that are there already, and whether they are its last."""
    pieces: list[bytes] = []
    while not messages.empty():
        if (message := messages.get_nowait()) is None:
            return b"".join(pieces), True
        pieces.append(message.get("body", b""))
    return b"".join(pieces), False


async def collected(app: ASGIApp, request: Forwarded) -> Whole:
    """The whole response of the app."""
    head: Head | None = None
    pieces: list[bytes] = []
    async with aclosing(exchange(app, request)) as items:
        async for item in items:
            if isinstance(item, Head):
                head = item
            pieces.append(item.body if isinstance(item, Head) else item)
    assert head is not None, "the app sent no response"
    return Whole(head.status, head.headers, b"".join(pieces))
