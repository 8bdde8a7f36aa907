"""Merges several continuations into one stream, in order of arrival."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from server.concurrency import cancelled
from server.errors import ServiceError
from server.service.generation import Continuation, Piece

Item = tuple[int, list[Piece]]


async def merged(continuations: Sequence[Continuation]) -> AsyncGenerator[Item]:
    """Yields (index, pieces) of all; a continuation without any token yields a single empty list."""
    if len(continuations) == 1:
        async with aclosing(_from(0, continuations[0])) as items:
            async for item in items:
                yield item
        return
    ready: asyncio.Queue[Item | Exception | None] = asyncio.Queue(maxsize=1)
    tasks = [asyncio.ensure_future(_pump(i, one, ready)) for i, one in enumerate(continuations)]
    running = len(tasks)
    try:
        while running:
            found = await ready.get()
            if isinstance(found, Exception):
                raise found
            if found is None:
                running -= 1
            else:
                yield found
    finally:
        await cancelled(*tasks)


async def _from(index: int, one: Continuation) -> AsyncGenerator[Item, None]:
    async with aclosing(one.chunks()) as chunks:
        async for chunk in chunks:
            yield index, chunk
    if not one.pieces:
        yield index, []


async def _pump(index: int, one: Continuation, ready: asyncio.Queue[Item | Exception | None]) -> None:
    try:
        async with aclosing(_from(index, one)) as items:
            async for item in items:
                await ready.put(item)
        await ready.put(None)
    except asyncio.CancelledError:
        raise
    except BaseException as error:  # otherwise ``merged`` would wait for ever
        await ready.put(error if isinstance(error, Exception) else ServiceError("internal error"))
