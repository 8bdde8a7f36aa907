import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from collections.abc import Sequence as Ids
from typing import Any

import pytest
import torch

from server.engine.engine import Engine
from server.engine.fair_lock import FairLock
from server.engine.faults import DeviceLost
from server.engine.sequence import SamplingParams, Sequence, StepStats, Token
from server.engine.token_stream import TokenStream
from server.errors import DeadlinePassed, GenerationFailed, NotReady
from tests.conftest import PATIENCE, until
from tests.fakes import FakeRunner, fake_model

PROMPT = [70, 71, 72]


def with_engine(test: Callable[[Engine, FakeRunner], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        runner = options.pop("runner", None) or FakeRunner()
        engine = Engine(fake_model(runner=runner), eos_ids=frozenset({0}), **options)
        await engine.start()
        try:
            await test(engine, runner)
        finally:
            await engine.stop()
        assert runner.closed

    asyncio.run(main())


def params(count: int = 8, **others: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, **others)


async def ids_of(generation: TokenStream) -> list[int]:
    return [token.id async for token in generation]


async def settled(engine: Engine) -> None:
    await until(lambda: not engine.running + engine.waiting)


def test_more_sequences_than_slots_all_get_their_own_continuation() -> None:
    async def check(engine: Engine, runner: FakeRunner) -> None:
        prompts = [[60 + i, 70, *range(80, 80 + i)] for i in range(11)]
        counts = [3 + i % 5 for i in range(11)]
        found = await asyncio.gather(
            *(ids_of(engine.generate(p, params(n))) for p, n in zip(prompts, counts, strict=True))
        )
        assert found == [runner.expected(p, n) for p, n in zip(prompts, counts, strict=True)]
        assert max(runner.batches) == runner.slots
        assert len(runner.threads) == 1
        await settled(engine)
        assert not runner.held

    with_engine(check, prefill_chunk=24)


def test_a_row_joins_while_another_runs() -> None:
    async def check(engine: Engine, runner: FakeRunner) -> None:
        long = engine.generate(PROMPT, params(60))
        await anext(long)
        assert await ids_of(engine.generate([75], params(3))) == runner.expected([75], 3)
        assert not long.timeline.tokens >= 60
        assert (await ids_of(long))[-1] == runner.expected(PROMPT, 60)[-1]

    runner = FakeRunner()
    runner.delay = 0.005
    with_engine(check, runner=runner)


def test_closing_frees_the_slot_queued_or_running() -> None:
    async def check(engine: Engine, runner: FakeRunner) -> None:
        streams = [engine.generate(PROMPT, params(200)) for _ in range(6)]
        await anext(streams[0])
        for stream in streams:
            stream.close()
        await settled(engine)
        assert not runner.held
        assert await ids_of(engine.generate(PROMPT, params(4))) == runner.expected(PROMPT, 4)

    runner = FakeRunner()
    runner.delay = 0.002
    with_engine(check, runner=runner)


@pytest.mark.parametrize("error", [RuntimeError("boom"), MemoryError(), torch.OutOfMemoryError("CUDA")])
def test_a_fault_in_prefill_costs_that_request_only(error: Exception) -> None:
    async def check(engine: Engine, runner: FakeRunner) -> None:
        def fail(slot: int, ids: Any) -> None:
            if 99 in ids:
                raise error

        runner.on_prefill = fail
        good, bad = engine.generate(PROMPT, params()), engine.generate([99], params())
        with pytest.raises(GenerationFailed) as caught:
            await ids_of(bad)
        assert "boom" not in caught.value.message
        assert await ids_of(good) == runner.expected(PROMPT, 8)
        await settled(engine)

    with_engine(check)


def test_a_batch_that_does_not_fit_is_decoded_row_by_row() -> None:
    async def check(engine: Engine, runner: FakeRunner) -> None:
        def fail(slots: Any) -> None:
            if len(slots) > 1:
                raise MemoryError

        runner.on_decode = fail
        both = await asyncio.gather(*(ids_of(engine.generate([80 + i], params(5))) for i in range(2)))
        assert both == [runner.expected([80], 5), runner.expected([81], 5)]

    with_engine(check)


def test_nan_logits_cost_that_row_only() -> None:
    async def check(engine: Engine, runner: FakeRunner) -> None:
        def poison(logits: torch.Tensor, slots: Any) -> torch.Tensor:
            for row, slot in enumerate(slots):
                if 99 in runner.held[slot] and len(runner.held[slot]) > 3:
                    logits[row] = float("nan")
            return logits

        runner.poison = poison
        good, bad = engine.generate(PROMPT, params()), engine.generate([99], params())
        with pytest.raises(GenerationFailed, match="not numbers"):
            await ids_of(bad)
        assert await ids_of(good) == runner.expected(PROMPT, 8)

    with_engine(check)


def test_a_dead_worker_fails_its_streams() -> None:
    deaths: list[str] = []

    async def check(engine: Engine, runner: FakeRunner) -> None:
        def die(slots: Any) -> None:
            raise SystemExit

        runner.on_decode = die
        with pytest.raises(GenerationFailed):
            await ids_of(engine.generate(PROMPT, params()))
        assert engine.health() is not None
        assert deaths
        assert deaths[0].startswith("fp32")
        with pytest.raises(NotReady):
            engine.generate(PROMPT, params())
        runner.closed = True

    with_engine(check, on_death=deaths.append)


@pytest.mark.parametrize("error", [MemoryError("no memory"), DeviceLost("the device no longer works")])
def test_a_failed_warm_up_raises_and_releases_the_model(error: BaseException) -> None:
    async def main() -> None:
        runner = FakeRunner()

        def fail(slot: int, ids: Ids[int]) -> None:
            raise error

        runner.on_prefill = fail
        with pytest.raises((MemoryError, RuntimeError)):
            await asyncio.wait_for(Engine(fake_model(runner=runner), eos_ids=frozenset()).start(), PATIENCE)
        await until(lambda: runner.closed)

    asyncio.run(main())


def test_deadlines_end_running_and_waiting_sequences() -> None:
    async def check(engine: Engine, runner: FakeRunner) -> None:
        soon = time.perf_counter() + 0.1
        streams = [engine.generate([60 + i], params(200), deadline=soon) for i in range(6)]
        for stream in streams:
            with pytest.raises(DeadlinePassed):
                await ids_of(stream)
        assert [60 + 5] not in [ids[:1] for ids in runner.held.values()]
        await settled(engine)

    runner = FakeRunner()
    runner.delay = 0.01
    with_engine(check, runner=runner)


def test_prompt_logprobs_in_chunks_and_no_token_at_all() -> None:
    async def check(engine: Engine, runner: FakeRunner) -> None:
        generation = engine.generate([70, 71, 72, 73, 74], params(0, prompt_logprobs=True))
        assert await ids_of(generation) == []
        assert [t.id for t in generation.prompt_tokens] == [70, 71, 72, 73, 74]
        assert generation.prompt_tokens[0].logprob is None
        expected = runner.score([70, 71, 72, 73]).log_softmax(-1)
        found = [t.logprob for t in generation.prompt_tokens[1:]]
        assert found == pytest.approx([float(expected[i, 71 + i]) for i in range(4)], abs=1e-5)

    with_engine(check, prefill_chunk=2)


def test_available_tokens_are_read_without_waiting() -> None:
    async def check(engine: Engine, runner: FakeRunner) -> None:
        generation = engine.generate(PROMPT, params(5))
        await until(lambda: not engine.running + engine.waiting)  # all are delivered
        found = []
        for _ in range(5):
            with pytest.raises(StopIteration) as read:  # a coroutine that never suspends raises this
                anext(generation).__await__().send(None)
            found.append(read.value.value.id)
        assert found == runner.expected(PROMPT, 5)

    with_engine(check)


def test_a_cancelled_wait_loses_no_token() -> None:
    async def check(engine: Engine, runner: FakeRunner) -> None:
        runner.delay = 0.03
        generation, found, given_up = engine.generate(PROMPT, params(6)), list[int](), 0
        while len(found) < 6:
            try:
                found.append((await asyncio.wait_for(anext(generation), 0.01)).id)
            except TimeoutError:
                given_up += 1
        assert found == runner.expected(PROMPT, 6)
        assert given_up
        runner.delay = 0.0

    with_engine(check)


def test_a_token_that_arrives_with_a_cancellation_goes_to_the_next_read() -> None:
    """Its future is done, but the coroutine has not resumed yet."""

    async def check(engine: Engine, runner: FakeRunner) -> None:
        generation = TokenStream(Sequence(PROMPT, params()), engine.cancel)
        reader = asyncio.create_task(ids_of(generation))
        await asyncio.sleep(0)
        for id_ in (5, 6):
            generation.put(Token(id_))
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        generation.put(Token(7, finish="length"))
        assert await ids_of(generation) == [5, 6, 7]

    with_engine(check)


def test_a_waiting_reader_receives_the_end() -> None:
    async def check(engine: Engine, runner: FakeRunner) -> None:
        for end in (None, GenerationFailed("broken")):
            generation = TokenStream(Sequence(PROMPT, params()), engine.cancel)
            reader = asyncio.create_task(ids_of(generation))
            await asyncio.sleep(0)
            generation.put(Token(5))
            generation.put(end)
            if end is None:
                assert await reader == [5]
            else:
                with pytest.raises(GenerationFailed):
                    await reader
            with pytest.raises(StopAsyncIteration):
                await anext(generation)

    with_engine(check)


def test_steps_are_reported_with_gaps_and_batch() -> None:
    seen: list[StepStats] = []

    async def check(engine: Engine, runner: FakeRunner) -> None:
        await asyncio.gather(*(ids_of(engine.generate([80 + i], params(5))) for i in range(2)))
        assert sum(step.generated_tokens for step in seen) == 10
        assert sum(step.prompt_tokens for step in seen) == 2
        assert sum(len(step.gaps) for step in seen) == 8

    with_engine(check, on_step=seen.append)


def test_a_stalled_step_is_detected_and_its_streams_fail() -> None:
    async def check(engine: Engine, runner: FakeRunner) -> None:
        go_on = threading.Event()

        def hang(slot: int, ids: Ids[int]) -> None:
            assert go_on.wait(PATIENCE)

        runner.on_prefill = hang
        generation = engine.generate(PROMPT, params())
        await until(lambda: engine.stalled_seconds > 0.05)
        engine.fail("hung")
        with pytest.raises(GenerationFailed, match="hung"):
            await ids_of(generation)
        go_on.set()

    with_engine(check)


def test_turns_are_taken_in_order() -> None:
    turn, order, go_on = FairLock(), list[int](), threading.Event()

    async def take(name: int) -> None:
        def hold() -> None:
            with turn:
                order.append(name)
                assert go_on.wait(PATIENCE)

        await asyncio.to_thread(hold)

    async def main() -> None:
        tasks = []
        for name in range(5):
            tasks.append(asyncio.create_task(take(name)))
            await until(lambda: len(order) + len(turn._queue) == len(tasks))
        go_on.set()
        await asyncio.gather(*tasks)

    asyncio.run(main())
    assert order == [0, 1, 2, 3, 4]
