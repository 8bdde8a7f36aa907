"""Between tasks, futures and threads: what ends first, and what a future receives."""

import asyncio
import threading

import pytest

from server.concurrency import Interrupted, resolve_future, run_for_future, run_until


async def _forever() -> None:
    await asyncio.Event().wait()


def test_the_result_of_work_that_ends_first_is_returned() -> None:
    async def main() -> None:
        async def work() -> int:
            return 7

        assert await run_until(_forever(), work()) == 7

    asyncio.run(main())


def test_an_event_that_comes_first_cancels_the_work_and_raises() -> None:
    async def main() -> None:
        ended: list[str] = []

        async def work() -> None:
            try:
                await _forever()
            finally:
                ended.append("work")

        with pytest.raises(Interrupted):
            await run_until(asyncio.sleep(0), work(), lambda: ended.append("release"))
        assert ended == ["release", "work"]

    asyncio.run(main())


def test_a_cancellation_releases_before_anything_is_awaited() -> None:
    async def main() -> None:
        started, held = asyncio.Event(), asyncio.Event()
        released: list[bool] = []

        async def work() -> None:
            started.set()
            try:
                await _forever()
            finally:
                await held.wait()  # its end takes long

        task = asyncio.create_task(run_until(_forever(), work(), lambda: released.append(True)))
        await started.wait()
        task.cancel()
        await asyncio.sleep(0)
        assert released
        assert not task.done()
        held.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


def test_a_future_that_is_done_keeps_its_outcome() -> None:
    async def main() -> None:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        resolve_future(future, 1)
        resolve_future(future, error=ValueError())
        assert future.result() == 1
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        resolve_future(future, 1)
        assert future.cancelled()

    asyncio.run(main())


def test_work_on_a_thread_resolves_the_future_with_what_it_returns_or_raises() -> None:
    async def main() -> None:
        class Panic(BaseException): ...

        def fail() -> None:
            raise Panic

        for work, expected in ((threading.get_ident, None), (fail, Panic)):
            future: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
            thread = threading.Thread(target=run_for_future, args=(work, future))
            thread.start()
            if expected is None:
                assert await future == thread.ident
            else:
                with pytest.raises(expected):
                    await future

    asyncio.run(main())


def test_work_for_a_loop_that_is_closed_is_dropped() -> None:
    loop = asyncio.new_event_loop()
    future: asyncio.Future[int] = loop.create_future()
    loop.close()
    run_for_future(lambda: 1, future)
    assert not future.done()
