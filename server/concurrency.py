"""Helpers for tasks and futures."""

import asyncio
from typing import Any, TypeVar, cast

T = TypeVar("T")


async def cancelled(*tasks: asyncio.Future[Any]) -> None:
    """Cancels the tasks and waits until they have ended; their exceptions are dropped."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def resolve_future(
    future: asyncio.Future[T], result: T | None = None, error: BaseException | None = None
) -> None:
    """Sets the future's exception, or else its result; does nothing when the future is done."""
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(cast(T, result))
