"""Helpers for tasks and futures."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar, cast

T = TypeVar("T")


class Interrupted(Exception):
    """The event came before the work was done."""


async def run_until(
    event: Coroutine[Any, Any, object],
    work: Coroutine[Any, Any, T],
    release: Callable[[], object] = lambda: None,
) -> T:
    """The result of ``work``, which is cancelled if ``event`` ends first.

    Args:
        release: is called however the work ends. It doesn't wait, and nothing is awaited before it: no
            cancellation can prevent it.

    Raises:
        Interrupted: the event came first.
    """
    task, coming = asyncio.ensure_future(work), asyncio.ensure_future(event)
    try:
        await asyncio.wait({task, coming}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Interrupted
    except BaseException:
        release()
        await cancelled(task, coming)
        raise
    release()
    coming.cancel()  # not awaited: a cancellation here would lose the result
    return task.result()


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


def run_for_future(work: Callable[[], T], future: asyncio.Future[T]) -> None:
    """Runs ``work`` on this thread; its result or exception resolves the future on the future's event loop.

    Where that loop is closed, the outcome is dropped.
    """
    try:
        result = work()
    except BaseException as error:  # a library in Rust panics with one that is no ``Exception``
        _on_loop_of(future, None, error)
    else:
        _on_loop_of(future, result, None)


def _on_loop_of(future: asyncio.Future[T], result: T | None, error: BaseException | None) -> None:
    with suppress(RuntimeError):  # the loop is closed
        future.get_loop().call_soon_threadsafe(resolve_future, future, result, error)
