"""Several continuations as one stream, each token when it comes."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing

from server.generation import Continuation, Piece
from server.replies import cancelled


async def merged(continuations: Sequence[Continuation]) -> AsyncIterator[tuple[int, Piece | None]]:
    """(index, piece) of all; one that ends without any token gives a single None."""
    ready: asyncio.Queue[tuple[int, Piece | None] | Exception | None] = asyncio.Queue(maxsize=1)
    tasks = [asyncio.ensure_future(_pump(i, one, ready)) for i, one in enumerate(continuations)]
    running = len(tasks)
    try:
        while running:
            item = await ready.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        await cancelled(*tasks)


async def _pump(
    index: int, one: Continuation, ready: asyncio.Queue[tuple[int, Piece | None] | Exception | None]
) -> None:
    try:
        async with aclosing(one.__aiter__()) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                await ready.put((index, piece))
        if not one.pieces:
            await ready.put((index, None))
        await ready.put(None)
    except Exception as error:
        await ready.put(error)
