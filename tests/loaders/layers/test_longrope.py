"""Rotations that depend on a text's length, selected by row: alone, in any batch and in any chunks."""

import asyncio
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, PreTrainedModel

from loaders.cuda.graph_runner import GraphRunner
from loaders.cuda.static_cache import Unsuitable
from loaders.runners.transformers_runner import TransformersRunner
from server.engine.engine import Engine
from server.engine.sequence import SamplingParams
from tests.fakes import fake_model
from tests.loaders.runners.test_transformers_runner import reference, spec_of

ORIGINAL = 64
LONG = [1 + (7 * i) % 299 for i in range(100)]


def phi3() -> Phi3ForCausalLM:
    torch.manual_seed(0)
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8,
        "long_factor": [1, 1.5, 2, 3, 5, 8, 12, 16], "original_max_position_embeddings": ORIGINAL,
    }  # fmt: skip
    config = Phi3Config(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, original_max_position_embeddings=ORIGINAL,
        rope_parameters=rope, initializer_range=0.2, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return Phi3ForCausalLM(config).eval()


def one_pass(model: PreTrainedModel, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([ids])).logits[0]
    return logits


def generated(prompts: list[tuple[list[int], int]], chunk: int) -> list[list[int]]:
    """Greedy continuations of prompts in one batch, each with its number of new tokens."""

    async def run() -> list[list[int]]:
        loaded, model = fake_model(), phi3()
        loaded.runner = TransformersRunner(model, spec_of(model))
        engine = Engine(loaded, eos_ids=frozenset(), prefill_chunk=chunk, prefill_chunk_busy=chunk)
        await engine.start()

        async def one(prompt: list[int], count: int) -> list[int]:
            return [token.id async for token in engine.generate(prompt, SamplingParams(max_new_tokens=count))]

        found = await asyncio.gather(*(one(prompt, count) for prompt, count in prompts))
        await engine.stop()
        return list(found)

    return asyncio.run(run())


def test_a_prompt_in_chunks_has_the_log_probabilities_of_one_pass() -> None:
    async def run() -> list[float]:
        loaded, model = fake_model(), phi3()
        loaded.runner = TransformersRunner(model, spec_of(model))
        engine = Engine(loaded, eos_ids=frozenset(), prefill_chunk=32)
        await engine.start()
        generation = engine.generate(LONG, SamplingParams(max_new_tokens=1, prompt_logprobs=True))
        _ = [token async for token in generation]
        await engine.stop()
        return [token.logprob or 0.0 for token in generation.prompt_tokens]

    found = torch.tensor(asyncio.run(run()))
    assert [round(float(value), 3) for value in found[90:93]] == [-7.346, -6.320, -7.614]
    expected = one_pass(phi3(), LONG).log_softmax(-1)[range(99), LONG[1:]]
    torch.testing.assert_close(found[1:], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk", [7, 128])
def test_rows_below_above_and_crossing_the_original_context_equal_generate(chunk: int) -> None:
    """Short, long, and two that outgrow the short rotation, which ``generate`` recomputes as well."""
    prompts = [(LONG, 20), (LONG[:20], 30), (LONG[3:53], 40), (LONG[:ORIGINAL], 5)]
    model = phi3()
    expected = [reference(model, prompt, count) for prompt, count in prompts]
    assert generated(prompts, chunk) == expected
    assert [generated([one], chunk)[0] for one in prompts] == expected


def test_the_rows_of_a_step_do_not_share_their_rotation() -> None:
    model = phi3()
    runner = TransformersRunner(phi3(), spec_of(model))
    for slot, prompt in enumerate((LONG, LONG[:20])):
        for start in range(0, len(prompt), 32):
            runner.prefill(slot, prompt[start : start + 32])
    both = runner.decode([0, 1], [5, 6])
    for row, ids in zip(both, ([*LONG, 5], [*LONG[:20], 6]), strict=True):
        torch.testing.assert_close(row, one_pass(model, ids)[-1], atol=1e-4, rtol=1e-4)
    together = runner.score_together([LONG, LONG[::-1]], 3)
    torch.testing.assert_close(together[0], one_pass(model, LONG)[-3:], atol=1e-4, rtol=1e-4)
    runner.free(0)
    last = runner.prefill(0, LONG[:9])
    assert last is not None
    torch.testing.assert_close(last[0], one_pass(model, LONG[:9])[-1], atol=1e-4, rtol=1e-4)


def test_a_step_that_fails_in_recomputing_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    model = phi3()
    runner = TransformersRunner(phi3(), spec_of(model))
    runner.prefill(0, LONG[:ORIGINAL])
    monkeypatch.setattr("loaders.runners.transformers_runner._RECOMPUTED", 16)
    forward, calls = runner._forward, []

    def failing(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 3:
            raise MemoryError
        return forward(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(runner, "_forward", failing)
    with pytest.raises(MemoryError):
        runner.decode([0], [5])
    found = runner.decode([0], [5])[0]
    torch.testing.assert_close(found, one_pass(model, [*LONG[:ORIGINAL], 5])[-1], atol=1e-4, rtol=1e-4)


def test_captured_steps_require_a_single_rotation() -> None:
    model = phi3()
    with pytest.raises(Unsuitable, match="LongRoPE"):
        GraphRunner(model, spec_of(model), None)
    runner = GraphRunner(model, replace(spec_of(model), context=ORIGINAL), None)
    last = runner.prefill(0, LONG[:ORIGINAL])
    assert last is not None
    torch.testing.assert_close(last[0], one_pass(model, LONG[:ORIGINAL])[-1], atol=1e-4, rtol=1e-4)


def test_dynamic_ntk_never_starts_within_the_context() -> None:
    """Beyond ``max_position_embeddings`` every token changes every frequency; but that is the context."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=ORIGINAL, initializer_range=0.2,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    runner = TransformersRunner(model, replace(spec_of(model), context=ORIGINAL))
    expected = one_pass(model, LONG[:ORIGINAL])
    for start in range(0, ORIGINAL - 1, 9):
        runner.prefill(0, LONG[start : start + 9])
    with pytest.raises(ValueError, match="do not fit"):
        runner.score(LONG)
    found = runner.decode([0], LONG[ORIGINAL - 1 : ORIGINAL])[0]
    torch.testing.assert_close(found, expected[-1], atol=1e-4, rtol=1e-4)
