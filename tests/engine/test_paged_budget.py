"""Engines of several precisions over one budget, and sequences that exceed it."""

import asyncio
import time

import pytest

from loaders.kv_cache.budget import KVBudget
from server.engine.engine import Engine
from server.engine.token_stream import TokenStream
from server.errors import DeadlinePassed, GenerationFailed
from tests.conftest import until
from tests.fakes import fake_model
from tests.paged import BLOCK_BYTES, LONG, FakePagedRunner, ids_of, paged, params, with_engines


def test_a_waiting_sequence_expires_in_time_while_nothing_runs_here() -> None:
    budget = KVBudget(8 * BLOCK_BYTES)
    holder, waiter = FakePagedRunner(2, 256, budget), FakePagedRunner(2, 256, budget)

    async def check(holding: Engine, waiting: Engine) -> None:
        holder.delay = 0.02
        running = holding.generate(LONG, params(90, ignore_eos=True))
        assert (await anext(running)).id == holder.expected(LONG, 1)[0]
        late = waiting.generate(LONG, params(2), deadline=time.perf_counter() + 0.05)
        cancelled = waiting.generate(LONG, params(2))
        with pytest.raises(DeadlinePassed):
            await ids_of(late)
        cancelled.close()
        await until(lambda: not waiting.waiting)
        assert holding.running == 1
        running.close()
        assert await ids_of(waiting.generate(LONG, params(2))) == waiter.expected(LONG, 2)

    with_engines(check, holder, waiter)


def test_two_precisions_share_a_budget_that_holds_one_sequence_each_at_most() -> None:
    budget = KVBudget(9 * BLOCK_BYTES)
    runners = [FakePagedRunner(4, 256, budget), FakePagedRunner(4, 256, budget)]
    most = 0

    def record(slots: object) -> None:
        nonlocal most
        most = max(most, budget.committed)

    async def check(*engines: Engine) -> None:
        for runner in runners:
            runner.on_decode = record
        prompts = [[60 + i, *LONG[: 40 + i]] for i in range(6)]
        found = await asyncio.gather(
            *(ids_of(one.generate(p, params(50), owner="")) for p in prompts for one in engines)
        )
        assert found == [runners[0].expected(p, 50) for p in prompts for _ in engines]
        assert 0 < most <= 9 * BLOCK_BYTES

    with_engines(check, *runners)


def test_a_busy_precision_does_not_starve_another() -> None:
    budget = KVBudget(8 * BLOCK_BYTES)
    busy, other = FakePagedRunner(4, 256, budget), FakePagedRunner(4, 256, budget)
    ended: list[str] = []

    async def run(name: str, stream: TokenStream) -> None:
        await ids_of(stream)
        ended.append(name)

    async def check(first: Engine, second: Engine) -> None:
        busy.delay = 0.001
        many = [run("busy", first.generate([60 + i, *LONG[:60]], params(20))) for i in range(20)]
        tasks = [asyncio.create_task(one) for one in many]
        await until(lambda: first.running > 0)
        tasks.append(asyncio.create_task(run("other", second.generate(LONG, params(2)))))
        await asyncio.gather(*tasks)
        assert ended.index("other") < 12

    with_engines(check, busy, other)


def test_a_sequence_that_exceeds_the_whole_budget_fails_and_others_go_on() -> None:
    runner = paged(blocks=8)

    async def check(engine: Engine) -> None:
        assert engine.capacity == 256
        assert runner.pool.widen(2 * BLOCK_BYTES)
        assert engine.capacity == 128
        fine = engine.generate(LONG[:40], params(4))
        too_long = engine.generate(LONG, params(4))
        growing = engine.generate(LONG[1:126], params(20))
        for stream in (too_long, growing):
            with pytest.raises(GenerationFailed, match="out of memory"):
                await ids_of(stream)
        assert await ids_of(fine) == runner.expected(LONG[:40], 4)

    with_engines(check, runner)


def test_an_engine_starts_while_others_hold_all_blocks() -> None:
    budget = KVBudget(8 * BLOCK_BYTES)
    first = FakePagedRunner(2, 256, budget)

    async def check(engine: Engine) -> None:
        first.delay = 0.003
        running = engine.generate(LONG, params(90, ignore_eos=True))
        await until(lambda: first.pool.stats().used == 8)
        second = FakePagedRunner(2, 256, budget)
        late = Engine(fake_model(runner=second), eos_ids=frozenset({0}))
        await asyncio.gather(late.start(), ids_of(running))
        assert await ids_of(late.generate([70], params(2))) == second.expected([70], 2)
        await late.stop()

    with_engines(check, first)
