"""Sequences over a pool of blocks: prefixes that are not computed again, admission and preemption."""

import asyncio
import time

import pytest
import torch

from loaders.kv_cache.block_pool import BLOCK_TOKENS
from server.engine.engine import Engine
from server.engine.token_stream import TokenStream
from server.errors import GenerationFailed
from tests.paged import LONG, ids_of, paged, params, with_engines


def test_a_known_prefix_is_not_computed_again() -> None:
    runner = paged()

    async def check(engine: Engine) -> None:
        first = engine.generate(LONG, params(), owner="key")
        assert await ids_of(first) == runner.expected(LONG, 8)
        assert first.cached_tokens == 0
        turn = [*LONG, *runner.expected(LONG, 8), 90, 91]
        before = runner.computed
        second = engine.generate(turn, params(4), owner="key")
        assert await ids_of(second) == runner.expected(turn, 4)
        assert second.cached_tokens == 5 * BLOCK_TOKENS
        assert runner.computed - before == len(turn) - 5 * BLOCK_TOKENS + 3

    with_engines(check, runner)


@pytest.mark.parametrize("owner", ["other", "", None])
def test_another_owners_prefix_is_computed(owner: str | None) -> None:
    runner = paged()

    async def check(engine: Engine) -> None:
        await ids_of(engine.generate(LONG, params(2), owner="key"))
        before = runner.computed
        stream = engine.generate(LONG, params(2), owner=owner)
        assert await ids_of(stream) == runner.expected(LONG, 2)
        assert (stream.cached_tokens, runner.computed - before) == (0, len(LONG) + 1)

    with_engines(check, runner)


def test_equal_prompts_at_once_are_computed_once() -> None:
    runner = paged()

    async def check(engine: Engine) -> None:
        before = runner.computed
        streams = [engine.generate(LONG, params(2), owner="") for _ in range(4)]
        assert await asyncio.gather(*map(ids_of, streams)) == [runner.expected(LONG, 2)] * 4
        assert [one.cached_tokens for one in streams] == [0, *[4 * BLOCK_TOKENS] * 3]
        assert runner.computed - before < len(LONG) + 4 * (BLOCK_TOKENS + 2)

    with_engines(check, runner, prefill_chunk=BLOCK_TOKENS, prefill_chunk_busy=8)


def test_without_an_owner_nothing_is_kept() -> None:
    runner = paged()

    async def check(engine: Engine) -> None:
        for _ in range(2):
            await ids_of(engine.generate(LONG, params(2)))
        assert runner.pool.stats().cached == 0

    with_engines(check, runner)


def test_a_prompt_whose_logits_are_read_is_computed_in_full() -> None:
    runner = paged()

    async def check(engine: Engine) -> None:
        await ids_of(engine.generate(LONG, params(2), owner=""))
        seen: list[int] = []
        reported = engine.generate(LONG, params(2, prompt_logprobs=True), owner="")
        observed = engine.generate(LONG, params(2), owner="", observe=lambda x: seen.append(len(x)))
        assert await ids_of(reported) == await ids_of(observed) == runner.expected(LONG, 2)
        assert [one.id for one in reported.prompt_tokens] == LONG
        assert (sum(seen), reported.cached_tokens, observed.cached_tokens) == (len(LONG), 0, 0)

    with_engines(check, runner, prefill_chunk=50)


def test_a_sequence_waits_until_its_prompt_has_room_and_the_first_comes_first() -> None:
    runner = paged(blocks=8)
    order: list[str] = []

    async def named(name: str, stream: TokenStream) -> None:
        async for _ in stream:
            if name not in order:
                order.append(name)

    async def check(engine: Engine) -> None:
        runner.delay = 0.002
        large = named("large", engine.generate(LONG, params(20), owner=""))
        larger = named("larger", engine.generate([99, *LONG], params(2), owner=""))
        small = named("small", engine.generate([70], params(2), owner=""))
        await asyncio.gather(large, larger, small)
        assert order == ["large", "larger", "small"]
        assert engine.preemptions == 0

    with_engines(check, runner)


def test_cancellation_storms_leave_no_block_behind() -> None:
    runner = paged(blocks=10)

    async def check(engine: Engine) -> None:
        runner.delay = 0.0005
        for wave in range(6):
            prompts = [[60 + i, *LONG[: 10 + 9 * i]] for i in range(16)]
            streams = [engine.generate(p, params(40), owner="") for p in prompts]
            await asyncio.sleep(0.01 * wave)
            for stream in streams[wave % 2 :]:
                stream.close()
            if wave % 2:
                assert await ids_of(streams[0]) == runner.expected(prompts[0], 40)

    with_engines(check, runner, prefill_chunk=32)


def test_a_failing_pass_frees_the_blocks_of_its_sequence_alone() -> None:
    runner = paged(blocks=10)

    def fail(slot: int, ids: object) -> None:
        if runner.pool.length(slot) >= 64:
            raise RuntimeError("broken")

    async def check(engine: Engine) -> None:
        runner.on_prefill = fail
        failing = engine.generate(LONG, params(2), owner="")
        fine = engine.generate(LONG[1:40], params(4), owner="")
        with pytest.raises(GenerationFailed, match="RuntimeError"):
            await ids_of(failing)
        assert await ids_of(fine) == runner.expected(LONG[1:40], 4)

    with_engines(check, runner, prefill_chunk=32)


def test_reserving_a_token_for_each_row_costs_little() -> None:
    runner = paged(blocks=200)
    for slot in range(16):
        runner.pool.attach(slot, [], "")
    started = time.thread_time()
    for step in range(200):
        for slot in range(16):
            assert runner.pool.reserve(slot, 1)
            runner.pool.append(slot, [step])
    assert time.thread_time() - started < 2, "of this thread: a step's share is some milliseconds at most"


def test_logits_are_those_of_the_whole_text() -> None:
    """Of the fake itself: it predicts from its blocks, as ``FakeRunner`` from its list."""
    runner = paged(blocks=8, slots=1)
    logits = runner.prefill(0, LONG)
    assert logits is not None
    assert torch.equal(logits[0], runner._logits(LONG))
