"""The compiled runner against ``transformers``' forward, and its guarantee of bit-identical results."""

import asyncio
import random
from dataclasses import replace

import pytest
import torch

import loaders
from loaders import kernels
from loaders.base import LoadedModel, ModelSpec, ignore_progress
from loaders.checkpoint import open_checkpoint
from loaders.pretrained import load_pretrained
from loaders.runners.decoder_cpu_runner import DecoderCPURunner
from server.engine.engine import Engine
from server.engine.sequence import SamplingParams

pytestmark = pytest.mark.skipif(kernels.get() is None, reason=str(kernels.find()))

PROMPT = list(range(30, 130))
PRECISIONS = ["fp32", "bf16", "fp16", "int8", "nf4", "fp4", "dynamic-int8"]
"""Those whose layers the compiled kernels compute."""


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return ModelSpec(open_checkpoint("bundled"), slots=16)


@pytest.fixture(scope="module", params=PRECISIONS)
def model(request: pytest.FixtureRequest, spec: ModelSpec) -> LoadedModel:
    return loaders.load(request.param, spec)


def test_it_serves_every_precision(model: LoadedModel) -> None:
    assert isinstance(model.runner, DecoderCPURunner)
    assert "compiled" in model.details["kernels"]


def test_fp32_logits_equal_transformers(spec: ModelSpec) -> None:
    reference = load_pretrained(spec, ignore_progress, dtype=torch.float32, device_map="cpu")
    with torch.inference_mode():
        expected = reference(torch.tensor([PROMPT])).logits[0]
    found = loaders.load("fp32", spec).runner.score(PROMPT)
    assert float((found - expected).abs().max()) < 1e-4


@pytest.mark.parametrize("precision", ["fp32", "bf16", "dynamic-int8"])
def test_keys_and_values_take_half_as_much_where_weights_are_rounded(precision: str, spec: ModelSpec) -> None:
    sizes = {}
    for kind in ("auto", "fp32", "fp16"):
        runner = loaders.load(precision, replace(spec, kv_dtype=kind)).runner
        assert runner.kv_cache_bytes == 0  # memory is taken with the first token
        runner.prefill(0, PROMPT, "none")
        sizes[kind] = runner.kv_cache_bytes
    assert sizes["fp32"] == 2 * sizes["fp16"]
    assert sizes["auto"] == sizes["fp32" if precision == "fp32" else "fp16"]


def test_half_precision_keys_and_values_change_little(spec: ModelSpec) -> None:
    exact, halved = (loaders.load("fp32", replace(spec, kv_dtype=kind)).runner for kind in ("fp32", "fp16"))
    difference = (halved.score(PROMPT) - exact.score(PROMPT)).abs().max()
    assert 0 < float(difference) < 0.05


def test_results_do_not_depend_on_how_a_prompt_is_chunked(model: LoadedModel) -> None:
    runner = model.runner
    whole = runner.score(PROMPT)
    runner.prefill(3, PROMPT[:33], "none")
    part = runner.prefill(3, PROMPT[33:99], "all")
    last = runner.decode([3], PROMPT[99:])
    runner.free(3)
    assert part is not None
    assert torch.equal(torch.cat([part, last]), whole[33:])


def test_prefill_and_decode_in_one_pass(model: LoadedModel) -> None:
    """Bit-identical to prefill and decode one after the other."""
    runner = model.runner
    assert isinstance(runner, DecoderCPURunner)

    def begin() -> None:
        runner.prefill(1, PROMPT[:20], "none")
        runner.prefill(4, PROMPT[50:57], "none")
        runner.prefill(2, PROMPT[:11], "none")

    begin()
    last = runner.prefill(2, PROMPT[11:40])
    assert last is not None
    expected = [last, runner.decode([1, 4], [7, 8])]
    after = runner.decode([1, 2, 4], [9, 10, 11])
    for slot in (1, 2, 4):
        runner.free(slot)
    begin()
    found = runner.advance(2, PROMPT[11:40], [1, 4], [7, 8])
    assert torch.equal(found, torch.cat(expected))
    assert torch.equal(runner.decode([1, 2, 4], [9, 10, 11]), after)
    for slot in (1, 2, 4):
        runner.free(slot)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("count", "tokens"), [(20, 16), pytest.param(50, 64, marks=pytest.mark.slow)])
def test_tokens_are_the_same_alone_and_in_full_batches(
    precision: str, count: int, tokens: int, spec: ModelSpec
) -> None:
    """Greedy tokens of each prompt, alone and then in full batches of changing rows."""
    chance = random.Random(0)
    prompts = [[chance.randrange(5, 2000) for _ in range(chance.randrange(1, 60))] for _ in range(count)]

    async def run() -> tuple[list[list[int]], list[list[int]]]:
        engine = Engine(
            loaders.load(precision, spec), eos_ids=frozenset(), prefill_chunk=32, prefill_chunk_busy=16
        )
        await engine.start()

        async def one(prompt: list[int]) -> list[int]:
            return [
                token.id async for token in engine.generate(prompt, SamplingParams(max_new_tokens=tokens))
            ]

        alone = [await one(prompt) for prompt in prompts]
        together = await asyncio.gather(*(one(prompt) for prompt in prompts))
        await engine.stop()
        return alone, list(together)

    alone, together = asyncio.run(run())
    assert alone == together


def test_a_prompt_that_does_not_fit_is_refused_and_changes_nothing(model: LoadedModel) -> None:
    runner = model.runner
    with pytest.raises(ValueError, match="do not fit"):
        runner.prefill(0, [7] * (runner.context + 1))
    expected = runner.score(PROMPT[:5])[-1]
    found = runner.prefill(0, PROMPT[:5])
    runner.free(0)
    assert found is not None
    assert torch.equal(found[0], expected)
