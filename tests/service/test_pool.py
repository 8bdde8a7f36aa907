import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from loaders.base import LoadedModel, ModelSpec, Progress
from loaders.errors import CheckpointError
from server.errors import NotReady, Unavailable
from server.host import memory
from server.lifecycle import Lifecycle
from server.observability.metrics import Metrics
from server.service.pool import Pool
from server.service.precision_state import LoadProgress
from server.service.watchdog import watch
from server.settings.server import Settings
from tests.conftest import until
from tests.fakes import FakeRunner, fake_checkpoint, fake_load


class Loads:
    """Counts loads, and can be slow or fail."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.threads: set[int] = set()
        self.seconds = 0.0
        self.under_way = self.most_at_once = 0
        self.error: Exception | None = None

    def __call__(self, precision: str, spec: ModelSpec, progress: Progress) -> LoadedModel:
        self.names.append(precision)
        self.threads.add(threading.get_ident())
        self.under_way += 1
        self.most_at_once = max(self.most_at_once, self.under_way)
        for step in range(4):
            progress("loading", step + 1, 4)
            time.sleep(self.seconds / 4)
        self.under_way -= 1
        if self.error is not None:
            raise self.error
        return fake_load(precision, spec, progress)


def with_pool(folder: Path, test: Callable[[Pool, Loads], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        loads = Loads()
        settings = Settings(device="cpu", **options)
        metrics, lifecycle = Metrics("fake"), Lifecycle()
        pool = Pool(fake_checkpoint(folder), settings, load=loads, metrics=metrics, lifecycle=lifecycle)
        try:
            await test(pool, loads)
        finally:
            await pool.stop()

    asyncio.run(main())


def test_fifty_first_requests_are_one_load_off_the_event_loop(tmp_path: Path) -> None:
    async def check(pool: Pool, loads: Loads) -> None:
        loads.seconds = 0.2
        ticks = 0

        async def use() -> str:
            async with pool.use("8bit") as engine:
                return engine.precision

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticker = asyncio.create_task(tick())
        assert await asyncio.gather(*(use() for _ in range(50))) == ["int8"] * 50
        ticker.cancel()
        assert loads.names == ["int8"]
        assert threading.get_ident() not in loads.threads
        assert ticks >= 3  # of 20
        assert pool.state("int8").state == "loaded"

    with_pool(tmp_path, check)


def test_precisions_are_loaded_one_at_a_time(tmp_path: Path) -> None:
    async def check(pool: Pool, loads: Loads) -> None:
        loads.seconds = 0.1

        async def use(name: str) -> None:
            async with pool.use(name):
                pass

        await asyncio.gather(*(use(name) for name in ("fp32", "bf16", "nf4")))
        assert sorted(loads.names) == ["bf16", "fp32", "nf4"]
        assert loads.most_at_once == 1

    with_pool(tmp_path, check)


def test_a_cancelled_waiter_does_not_cancel_the_load(tmp_path: Path) -> None:
    async def check(pool: Pool, loads: Loads) -> None:
        loads.seconds = 0.2

        async def use() -> None:
            async with pool.use("int8"):
                pass

        leaving, staying = asyncio.create_task(use()), asyncio.create_task(use())
        await asyncio.sleep(0.05)
        leaving.cancel()
        await staying
        assert loads.names == ["int8"]
        assert pool.state("int8").users == 0

    with_pool(tmp_path, check)


def test_a_failed_load_reports_why_and_is_not_retried_at_once(tmp_path: Path) -> None:
    async def check(pool: Pool, loads: Loads) -> None:
        loads.error = CheckpointError("the file is cut short")
        for _ in range(3):
            with pytest.raises(NotReady, match="cut short"):
                async with pool.use("nf4"):
                    pass
        assert loads.names == ["nf4"]
        assert pool.state("nf4").state == "failed"

    with_pool(tmp_path, check)


def test_what_the_host_cannot_run_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loaders.precisions.bnb.find_spec", lambda name: None)

    async def check(pool: Pool, loads: Loads) -> None:
        with pytest.raises(Unavailable, match="pip install"):
            async with pool.use("nf4"):
                pass
        assert loads.names == []

    with_pool(tmp_path, check)


def test_the_least_recently_used_idle_one_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "needed_bytes", lambda precision, spec: 1000)
    one = memory.used_bytes(fake_load("fp32", _spec(tmp_path)))

    async def check(pool: Pool, loads: Loads) -> None:
        for name in ("fp32", "int8", "nf4"):
            async with pool.use(name):
                pass
        async with pool.use("int8") as engine:
            engine.last_used = time.perf_counter() + 1
        async with pool.use("bf16"):
            pass
        loaded = {state.name for state in pool.states() if state.state == "loaded"}
        assert loaded == {"fp32", "int8", "bf16"}  # nf4 was idle longest; the default stays

    with_pool(tmp_path, check, memory_budget=3 * one + 500, max_batch_size=4)


def test_a_memory_error_has_both_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "needed_bytes", lambda precision, spec: 1000)

    async def check(pool: Pool, loads: Loads) -> None:
        with pytest.raises(NotReady, match=r"needs 1000 bytes, 999 are free"):
            async with pool.use("int8"):
                pass
        assert loads.names == []

    with_pool(tmp_path, check, memory_budget=999)


def test_progress_is_reported_and_unloading_closes(tmp_path: Path) -> None:
    async def check(pool: Pool, loads: Loads) -> None:
        loads.seconds = 0.5
        seen = [progress async for progress in pool.load("fp16")]
        assert LoadProgress("loading", 2, 4) in seen
        engine = pool.state("fp16").engine
        assert engine is not None
        await pool.unload("fp16")
        runner = engine.model.runner
        assert isinstance(runner, FakeRunner)
        assert runner.closed
        assert pool.state("fp16").state == "unloaded"

    with_pool(tmp_path, check)


def test_start_loads_the_default_first(tmp_path: Path) -> None:
    async def check(pool: Pool, loads: Loads) -> None:
        pool.start()
        await until(lambda: len(loads.names) == 3 and pool.state("fp16").state == "loaded")
        assert loads.names == ["nf4", "bf16", "fp16"]

    with_pool(tmp_path, check, precision="4bit", precisions="bf16,fp16")


def test_idle_precisions_are_unloaded_but_the_default_is_not(tmp_path: Path) -> None:
    """Without its default the server would not be ready, and would receive no more requests."""

    async def check(pool: Pool, loads: Loads) -> None:
        pool.start()
        await until(lambda: len(loads.names) == 2 and pool.state("bf16").state == "unloaded")
        await asyncio.sleep(0.3)
        assert pool.state("fp32").state == "loaded"

    with_pool(tmp_path, check, precisions="fp32,bf16", idle_unload_seconds=0.2)


def test_a_hung_worker_fails_its_requests_and_the_process(tmp_path: Path) -> None:
    async def check(pool: Pool, loads: Loads) -> None:
        lifecycle = Lifecycle()
        watching = asyncio.create_task(watch(pool, lifecycle, hang_timeout=0.2))
        async with pool.use("fp32") as engine:
            runner = engine.model.runner
            assert isinstance(runner, FakeRunner)
            runner.delay = 1.5
            from server.engine.sequence import SamplingParams

            with pytest.raises(Exception, match="no progress"):
                await anext(engine.generate([70], SamplingParams(max_new_tokens=4)))
            assert lifecycle.fatal is not None
        watching.cancel()

    with_pool(tmp_path, check)


def _spec(folder: Path) -> ModelSpec:
    return ModelSpec(fake_checkpoint(folder), slots=4)
