"""Preemption: who gives blocks back, when it goes on, and that its reader doesn't notice."""

import asyncio
from typing import Any

from loaders.kv_cache.budget import KVBudget
from server.engine.engine import Engine
from server.engine.token_stream import TokenStream
from tests.conftest import until
from tests.paged import BLOCK_BYTES, LONG, FakePagedRunner, ids_of, paged, params, tokens_of, with_engines

SAMPLED: list[dict[str, Any]] = [
    {},
    {"do_sample": True, "temperature": 1.3, "seed": 4},
    {"logprobs": True, "top_n": 2},
    {"repetition_penalty": 1.4, "frequency_penalty": 0.7},
    {"prompt_logprobs": True, "do_sample": True, "seed": 9},
]


async def run_mixed(engine: Engine, runner: FakePagedRunner) -> list[Any]:
    """Sixteen sequences of all kinds at once; what their readers got."""
    streams, seen = [], [[] for _ in range(16)]  # type: list[TokenStream], list[list[float]]
    for i in range(16):
        observe = None if i % 3 else lambda logits, i=i: seen[i].extend(logits.argmax(1).tolist())
        options = params(40 + i, ignore_eos=True, **SAMPLED[i % len(SAMPLED)])
        prompt = [60 + i, *LONG[: 5 + 3 * i]]
        streams.append(engine.generate(prompt, options, owner=f"key {i % 2}", observe=observe))
    tokens = await asyncio.gather(*map(tokens_of, streams))
    return [tokens, [one.prompt_tokens for one in streams], seen]


def test_preempted_sequences_continue_as_if_nothing_had_happened() -> None:
    found: dict[int | None, list[Any]] = {}
    for blocks in (None, 8):
        runner = paged(blocks)

        async def check(engine: Engine, blocks: int | None = blocks, runner: Any = runner) -> None:
            found[blocks] = await run_mixed(engine, runner)
            assert bool(engine.preemptions) is (blocks is not None)

        with_engines(check, runner, prefill_chunk=40, prefill_chunk_busy=16)
    assert found[8] == found[None]


def test_the_youngest_is_preempted_and_goes_on_before_those_behind_it() -> None:
    runner = paged(blocks=8)
    order: list[int] = []

    async def run(number: int, stream: TokenStream) -> None:
        assert await ids_of(stream) == runner.expected([60 + number], 100)
        order.append(number)

    async def check(engine: Engine) -> None:
        many = [engine.generate([60 + i], params(100, ignore_eos=True)) for i in range(9)]
        await asyncio.gather(*(run(i, stream) for i, stream in enumerate(many)))
        assert engine.preemptions > 0
        assert order == sorted(order)

    with_engines(check, runner)


def test_logits_of_a_prompt_are_read_once_though_it_is_computed_again() -> None:
    runner = paged(blocks=8)
    seen: list[int] = []

    async def check(engine: Engine) -> None:
        old = engine.generate([70], params(150, ignore_eos=True))
        young = engine.generate(
            LONG,
            params(3, prompt_logprobs=True),
            chunk=1,
            observe=lambda logits: seen.extend(logits.argmax(1).tolist()),
        )
        rest, found = await asyncio.gather(ids_of(old), ids_of(young))
        assert engine.preemptions == 1
        assert len(rest) == 150
        assert found == runner.expected(LONG, 3)
        assert seen == [runner.next_id(LONG[: end + 1]) for end in range(len(LONG))]
        assert [one.id for one in young.prompt_tokens] == LONG
        assert young.prompt_tokens[0].logprob is None

    with_engines(check, runner)


def test_running_sequences_keep_a_block_each_when_another_is_admitted() -> None:
    runner = paged(blocks=8)

    async def check(engine: Engine) -> None:
        running = engine.generate(LONG[:20], params(30, ignore_eos=True))
        await anext(running)
        large = engine.generate([*LONG, *LONG[:60]], params(2))  # the seven blocks that are left
        await asyncio.gather(ids_of(running), ids_of(large))
        assert engine.preemptions == 0

    with_engines(check, runner, prefill_chunk_busy=8)


def test_a_precision_whose_last_waiting_sequence_left_holds_no_other_up() -> None:
    budget = KVBudget(8 * BLOCK_BYTES)
    holder, waiter = FakePagedRunner(4, 256, budget), FakePagedRunner(4, 256, budget)

    async def check(holding: Engine, waiting: Engine) -> None:
        holder.delay = 0.002
        long = holding.generate(LONG[:100], params(90, ignore_eos=True))
        await anext(long)
        leaving = waiting.generate(LONG, params(2))
        reader = asyncio.create_task(ids_of(leaving))
        await until(lambda: waiting.waiting == 1)
        await asyncio.sleep(0.05)  # it tries to admit it
        leaving.close()
        assert await ids_of(holding.generate([70], params(2))) == holder.expected([70], 2)
        assert holding.running == 1, "the first one still runs"
        long.close()
        reader.cancel()

    with_engines(check, holder, waiter)
