"""Engines on a GPU: overlap with the host, several at the same time, faults isolated to their row."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest
import torch

from loaders.cuda.graph_runner import GraphRunner
from loaders.precisions.full import disable_tf32
from server.engine.engine import Engine
from server.engine.sampler import Sampler
from server.engine.sequence import SamplingParams, Token
from server.errors import GenerationFailed
from tests.engine.test_device_sampler import SETTINGS, made
from tests.engine.test_sampler import logits
from tests.fakes import fake_model
from tests.gpu.conftest import PRECISIONS, Load

pytestmark = pytest.mark.gpu
PROMPTS = [[5, 6, 7], [10] * 90, [3], list(range(20, 60)), [9, 8], [7] * 150, [200, 100, 50]]


def engine_of(runner: GraphRunner, ends: frozenset[int] = frozenset()) -> Engine:
    loaded = fake_model()
    loaded.runner = runner
    return Engine(loaded, eos_ids=ends)


async def tokens(engine: Engine, prompt: list[int], **params: Any) -> list[int]:
    sampling = SamplingParams(**{"max_new_tokens": 24, "ignore_eos": True, **params})
    return [token.id async for token in engine.generate(prompt, sampling)]


def with_engine(runner: GraphRunner, work: Callable[[Engine], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        engine = engine_of(runner)
        await engine.start()
        try:
            return await work(engine)
        finally:
            await engine.stop()

    return asyncio.run(main())


def generated(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    found: list[int] = output[0, len(prompt) :].tolist()
    return found


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("steady", [True, False])
def test_rows_that_join_and_leave_get_the_tokens_of_generate(load: Load, family: str, steady: bool) -> None:
    runner = load("fp32", family, slots=4, batch_invariant=steady)
    expected = [generated(runner.module, prompt, 10 + 3 * i) for i, prompt in enumerate(PROMPTS)]

    async def work(engine: Engine) -> list[list[int]]:
        rows = [tokens(engine, prompt, max_new_tokens=10 + 3 * i) for i, prompt in enumerate(PROMPTS)]
        return list(await asyncio.gather(*rows))

    assert with_engine(runner, work) == expected
    assert runner.slots == 4


@pytest.mark.parametrize("precision", PRECISIONS)
def test_seeded_requests_are_the_same_alone_and_among_fifteen(load: Load, precision: str) -> None:
    names = list(SETTINGS)
    asks = [{**SETTINGS[names[i % len(names)]], "seed": i} for i in range(16)]
    asks = [{"do_sample": True, **ask} for ask in asks]

    async def work(engine: Engine) -> tuple[list[list[int]], list[list[int]]]:
        calls = [partial(tokens, engine, PROMPTS[i % 7], **ask) for i, ask in enumerate(asks)]
        together = await asyncio.gather(*(call() for call in calls))
        return list(together), [await call() for call in calls]

    together, alone = with_engine(load(precision), work)
    assert together == alone


def test_the_device_sampler_picks_the_tokens_of_the_host_sampler() -> None:
    sampler = Sampler(frozenset())
    for seed in range(20):
        rows = logits(len(SETTINGS), seed=seed)
        on_host = sampler.sample(rows, [made(name, seed) for name in SETTINGS])
        on_device = sampler.launch(rows.to("cuda"), [made(name, seed) for name in SETTINGS]).wait()
        for name, one, other in zip(SETTINGS, on_host, on_device, strict=True):
            assert isinstance(one, Token)
            assert isinstance(other, Token)
            assert one.id == other.id, name


def test_one_engine_captures_while_another_serves(load: Load) -> None:
    """Each on its own thread; the serving engine computes, samples and waits meanwhile."""

    async def main() -> None:
        serving = engine_of(load("fp32"))
        await serving.start()
        expected = await tokens(serving, PROMPTS[0], max_new_tokens=100)
        done = asyncio.Event()

        async def serve() -> int:
            rounds = 0
            while not done.is_set():
                rows = [tokens(serving, PROMPTS[0], max_new_tokens=100) for _ in range(3)]
                rows.append(tokens(serving, PROMPTS[1], do_sample=True, top_p=0.9, seed=1))
                assert (await asyncio.gather(*rows))[:3] == [expected] * 3
                rounds += 1
            return rounds

        busy = asyncio.create_task(serve())
        for _ in range(3):
            runner = load("bf16", slots=8)
            other = engine_of(runner)
            await other.start()
            assert runner.captured, runner.report()
            await tokens(other, PROMPTS[2])
            await other.stop()
        done.set()
        assert await busy > 0
        await serving.stop()

    asyncio.run(main())


def test_out_of_memory_fails_its_request_only_and_memory_is_freed(load: Load) -> None:
    """The allocator raises on the worker's thread in the middle of a prompt."""

    def greedy(_: Any) -> None:
        torch.empty(10**13, dtype=torch.float32, device="cuda")

    async def work(engine: Engine) -> None:
        expected = await tokens(engine, PROMPTS[0])
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            others = [asyncio.create_task(tokens(engine, PROMPTS[0])) for _ in range(5)]
            bad = engine.generate(PROMPTS[1], SamplingParams(5), observe=greedy)
            with pytest.raises(GenerationFailed, match="out of memory"):
                await anext(bad)
            assert await asyncio.gather(*others) == [expected] * 5
        assert torch.cuda.memory_allocated() - before < 2**20
        assert (engine.running, engine.waiting) == (0, 0)

    with_engine(load("fp32"), work)


def test_a_slot_is_clean_after_its_client_disconnects(load: Load) -> None:
    async def work(engine: Engine) -> None:
        expected = await tokens(engine, PROMPTS[3])
        for leaves in range(1, 8):
            gone = engine.generate(PROMPTS[1], SamplingParams(100, ignore_eos=True))
            for _ in range(leaves):
                await anext(gone)
            gone.close()
            assert await tokens(engine, PROMPTS[3]) == expected

    with_engine(load("fp32", slots=1), work)


def test_fp32_matmuls_do_not_use_tf32() -> None:
    disable_tf32()
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(512, 512, generator=generator) for _ in range(2))
    exact = one.double() @ other.double()
    error = (one.to("cuda") @ other.to("cuda")).cpu().double() - exact
    assert float(error.abs().max()) < 1e-3  # TensorFloat-32 has an error of some 3e-2 here
