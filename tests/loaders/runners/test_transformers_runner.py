"""Continuous batching over transformers' own forward, against transformers' own ``generate``."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, MistralForCausalLM, PreTrainedModel

from loaders.base import Checkpoint, ModelSpec
from loaders.runners.transformers_runner import TransformersRunner
from server.engine.engine import Engine
from server.engine.sequence import SamplingParams
from tests import checkpoints
from tests.fakes import fake_model

MAKERS = {"gpt2": checkpoints.gpt2, "llama": checkpoints.llama}


def spec_of(model: PreTrainedModel, slots: int = 4) -> ModelSpec:
    vocabulary = model.config.vocab_size
    checkpoint = Checkpoint(
        "tiny", None, Path(), model.config, type(model).__name__, 256, vocabulary, frozenset({0}), 0
    )
    return ModelSpec(checkpoint, slots=slots)


def reference(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    output = model.generate(
        torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    ids: list[int] = output[0, len(prompt) :].tolist()
    return ids


@pytest.mark.parametrize("family", MAKERS)
def test_greedy_equals_generate_alone_and_in_mixed_batches(family: str) -> None:
    """Seven prompts of 1 … 90 tokens through four slots, prompts in chunks, rows joining and leaving."""
    model = MAKERS[family]()
    prompts = [[5, 6, 7], [10] * 90, [3], list(range(20, 60)), [9, 8], [7] * 30, [200, 100, 50]]
    counts = [30, 12, 25, 8, 40, 5, 17]
    expected = [reference(model, p, n) for p, n in zip(prompts, counts, strict=True)]

    async def run(together: bool) -> list[list[int]]:
        loaded = fake_model()
        loaded.runner = TransformersRunner(model, spec_of(model))
        engine = Engine(loaded, eos_ids=frozenset({0}), prefill_chunk=16)
        await engine.start()

        async def one(prompt: list[int], count: int) -> list[int]:
            params = SamplingParams(max_new_tokens=count, ignore_eos=True)
            return [token.id async for token in engine.generate(prompt, params)]

        pairs = list(zip(prompts, counts, strict=True))
        if together:
            found = list(await asyncio.gather(*(one(p, n) for p, n in pairs)))
        else:
            found = [await one(p, n) for p, n in pairs]
        await engine.stop()
        return found

    assert asyncio.run(run(together=False)) == expected
    assert asyncio.run(run(together=True)) == expected


@pytest.mark.parametrize("family", MAKERS)
def test_nan_of_a_broken_sequence_does_not_reach_the_next(family: str) -> None:
    """NaN keys in a freed slot are masked, also for rows shorter than others in the batch."""
    model = MAKERS[family]()
    runner = TransformersRunner(model, spec_of(model))
    runner.prefill(0, [5] * 40)
    with torch.inference_mode():
        for tensor in (*runner._cache._keys, *runner._cache._values):
            assert tensor is not None
            tensor[0, :, :40] = float("nan")
    runner.free(0)
    runner.prefill(0, [1, 2])
    runner.prefill(1, [3] * 30)
    both = runner.decode([0, 1], [4, 4])
    assert torch.isfinite(both).all()
    torch.testing.assert_close(both[0], runner.score([1, 2, 4])[-1], atol=1e-4, rtol=1e-4)


def test_slots_in_any_order() -> None:
    model = checkpoints.llama()
    runner = TransformersRunner(model, spec_of(model))
    prompts = {3: [5, 6], 0: [7, 8, 9], 2: [11]}
    for slot, prompt in prompts.items():
        runner.prefill(slot, prompt)
    found = runner.decode([3, 0, 2], [4, 4, 4])
    for row, prompt in zip(found, prompts.values(), strict=True):
        torch.testing.assert_close(row, runner.score([*prompt, 4])[-1], atol=1e-4, rtol=1e-4)


def test_a_sliding_window_is_respected() -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8, max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    prompt = list(range(30, 70))
    runner = TransformersRunner(model, spec_of(model))
    logits = runner.prefill(0, prompt)
    assert logits is not None
    found = [int(logits.argmax())]
    while len(found) < 20:
        found.append(int(runner.decode([0], found[-1:]).argmax()))
    assert found == reference(model, prompt, 20)


def test_a_prompt_longer_than_a_slot_is_refused_and_the_slot_unchanged() -> None:
    model = checkpoints.gpt2()
    runner = TransformersRunner(model, spec_of(model))
    runner.prefill(0, [5] * 250)
    with pytest.raises(ValueError, match="do not fit"):
        runner.prefill(0, [5] * 10)
    torch.testing.assert_close(
        runner.decode([0], [6])[0], runner.score([5] * 250 + [6])[-1], atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("make", MAKERS.values())
def test_the_cache_is_counted_from_its_tensors(make: Callable[[], PreTrainedModel]) -> None:
    model = make()
    runner = TransformersRunner(model, spec_of(model))
    runner.prefill(0, [1])
    config = model.config
    heads = config.num_key_value_heads if isinstance(config, LlamaConfig) else config.n_head
    width = 64 // (config.num_attention_heads)
    assert runner.kv_cache_bytes == 2 * 2 * 4 * heads * 256 * width * 4
    runner.close()
    assert runner.kv_cache_bytes == 0
