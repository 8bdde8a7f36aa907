"""An ASGI app's exchange with a request that is data."""

import asyncio
from contextlib import aclosing

import pytest
from starlette.types import Receive, Scope, Send

from server.ray.exchange import Forwarded, Head, collected, exchange

REQUEST = Forwarded("POST", "/generate", b"a=b", [(b"x-one", b"1")], b"body")


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    message = await receive()
    await send({"type": "http.response.start", "status": 201, "headers": [(b"x-two", b"2")]})
    described = f"{scope['method']} {scope['path']} {scope['query_string']!r} {scope['headers']}".encode()
    await send({"type": "http.response.body", "body": message["body"], "more_body": True})
    await send({"type": "http.response.body", "body": described})


def test_a_response_that_comes_at_once_is_one_item() -> None:
    async def items() -> list[Head | bytes]:
        async with aclosing(exchange(echo, REQUEST)) as pieces:
            return [piece async for piece in pieces]

    (head,) = asyncio.run(items())
    assert isinstance(head, Head)
    assert (head.status, head.headers) == (201, [(b"x-two", b"2")])
    assert head.body == b"bodyPOST /generate b'a=b' [(b'x-one', b'1')]"


def test_pieces_come_as_they_are_sent() -> None:
    async def run() -> None:
        step = asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for piece in (b"one", b"two"):
                await step.wait()
                step.clear()
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        async with aclosing(exchange(app, REQUEST)) as pieces:
            assert await anext(pieces) == Head(200, [], b"", False)
            for piece in (b"one", b"two"):
                step.set()
                assert await anext(pieces) == piece
            with pytest.raises(StopAsyncIteration):
                await anext(pieces)

    asyncio.run(run())


@pytest.mark.parametrize("started", [False, True])
def test_closing_the_exchange_is_a_disconnect(started: bool) -> None:
    async def run() -> None:
        freed = asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            if started:
                await send({"type": "http.response.start", "status": 200, "headers": []})
            assert (await receive())["type"] == "http.disconnect"
            freed.set()

        pieces = exchange(app, REQUEST)
        reading = asyncio.ensure_future(_read(pieces))
        await asyncio.sleep(0.01)
        assert not freed.is_set()
        reading.cancel()
        async with asyncio.timeout(1):
            await freed.wait()

    async def _read(pieces: object) -> None:
        async for _ in pieces:  # type: ignore[attr-defined]
            pass

    asyncio.run(run())


def test_an_app_that_fails_fails_the_exchange() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise LookupError("nothing")

    with pytest.raises(LookupError):
        asyncio.run(collected(app, REQUEST))
