"""Real weights: cached prefixes and preemptions change no bit of what a reader gets."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

import loaders
from loaders.base import ModelSpec
from loaders.kv_cache.block_pool import BLOCK_TOKENS
from loaders.kv_cache.budget import KVBudget
from loaders.runner import PagedRunner
from server.engine.engine import Engine
from server.engine.sequence import SamplingParams
from tests.paged import params, tokens_of

PREFIX = [5 + i * 7 % 80 for i in range(3 * BLOCK_TOKENS)]
KINDS: list[dict[str, Any]] = [
    {"logprobs": True, "top_n": 3},
    {"do_sample": True, "temperature": 1.4, "seed": 3, "logprobs": True},
    {"repetition_penalty": 1.5, "prompt_logprobs": True},
]


def sequences() -> list[tuple[list[int], SamplingParams]]:
    """Twelve prompts, of which four begin alike, with options of every kind."""
    prompts = [[*PREFIX[: 10 * i], 3 + i, *PREFIX[:7]] if i % 3 else [*PREFIX, 3 + i] for i in range(12)]
    return [(p, params(40, ignore_eos=True, **KINDS[i % 3])) for i, p in enumerate(prompts)]


async def run(model: loaders.LoadedModel) -> tuple[list[Any], int, int]:
    """What the readers of two rounds got, the tokens that were cached and the preemptions."""
    engine = Engine(model, eos_ids=frozenset(), prefill_chunk=48, prefill_chunk_busy=16)
    await engine.start()
    try:
        found, cached = [], 0
        for _ in range(2):
            streams = [engine.generate(ids, options, owner="") for ids, options in sequences()]
            tokens = await asyncio.gather(*map(tokens_of, streams))
            found.append((tokens, [one.prompt_tokens for one in streams]))
            cached += sum(one.cached_tokens for one in streams)
        return found, cached, engine.preemptions
    finally:
        await engine.stop()


@pytest.mark.parametrize("precision", ["fp32", "dynamic-int8"])
def test_a_full_pool_gives_the_same_tokens_as_an_unlimited_one(small_spec: ModelSpec, precision: str) -> None:
    def result(blocks: int | None) -> tuple[list[Any], int, int]:
        spec = replace(small_spec, slots=12)
        if blocks is not None:
            spec = replace(spec, kv_budget=KVBudget(blocks * block_bytes))
        model = loaders.load(precision, spec)
        assert isinstance(model.runner, PagedRunner)
        sizes.append(model.runner.pool.block_bytes)
        return asyncio.run(run(model))

    sizes: list[int] = []
    block_bytes = 0
    free, hits, preempted = result(None)
    assert (hits > 6 * BLOCK_TOKENS, preempted) == (True, 0)
    assert free[0] == free[1], "the second round begins with cached prefixes"
    block_bytes = sizes[0]
    tight, _, preempted = result(-(-small_spec.max_tokens // BLOCK_TOKENS) + 2)
    assert preempted > 0
    assert tight == free
