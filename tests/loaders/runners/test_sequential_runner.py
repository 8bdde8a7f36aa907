"""Models that can't be batched are served one sequence at a time, with the logits of whole texts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Phi3Config, PreTrainedModel

import loaders
from loaders.base import ModelSpec
from loaders.checkpoint import open_checkpoint
from loaders.errors import CheckpointError
from loaders.runner import GrowingRunner
from loaders.runners.sequential_runner import FORMS, SequentialRunner
from server.host.memory import full_cache_bytes
from tests import checkpoints
from tests.loaders.test_families import GATED, LOCAL, SIZES, generated, greedy, spec_of

BLOOM = {"vocab_size": 320, "hidden_size": 64, "n_layer": 2, "n_head": 4}
CHUNKED = {**GATED, "head_dim": 16, "attention_chunk_size": 16}
GPT = {"vocab_size": 320, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}
MAMBA = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16, "eos_token_id": 0}
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "local attention": ("gpt_neo", {**SIZES, **LOCAL}, "its rows disturb each other"),
    "ALiBi": ("bloom", BLOOM, "ValueError"),
    "ALiBi beside masks": ("falcon", {**SIZES, "alibi": True}, "ValueError"),
    "chunked attention": ("llama4_text", CHUNKED, "it has chunked_attention layers"),
    "recurrence that begins anew": ("mamba", MAMBA, "can't be batched here"),
}
"""Model type, configuration, a part of the reason."""


@pytest.mark.parametrize("name", FAMILIES)
def test_every_sequence_gets_the_tokens_that_it_gets_alone(name: str, tmp_path: Path) -> None:
    family, sizes, why = FAMILIES[name]
    spec = spec_of(family, sizes, tmp_path)
    loaded = loaders.load("fp32", spec)
    assert isinstance(loaded.runner, SequentialRunner)
    assert why in loaded.runner.report()["not_batched_because"]
    assert greedy(loaded, 8) == generated(loaded.runner._live, 8)


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_in_chunks_have_the_logits_of_one_pass(name: str, tmp_path: Path) -> None:
    family, sizes, _ = FAMILIES[name]
    runner = loaders.load("fp32", spec_of(family, sizes, tmp_path)).runner
    text = [5 + at for at in range(60)]
    expected = runner.score(text)
    size = float(expected.norm(dim=-1).max())
    found = [runner.prefill(0, text[at : at + 25], "all") for at in range(0, 50, 25)]
    assert torch.allclose(
        torch.cat([one for one in found if one is not None]), expected[:50], atol=1e-4 * size
    )
    runner.prefill(2, text[:1])
    runner.prefill(2, text[1:30], "none")
    resumed = runner.decode([2], [text[30]])[0]
    assert torch.allclose(resumed, expected[30], atol=1e-4 * size)
    assert runner.prefill(1, text[:25], "none") is None
    assert runner.prefill(1, text[25:40], "none") is None
    last = runner.prefill(1, text[40:50])
    assert last is not None
    for at in range(50, 60):
        assert torch.allclose(last[0], expected[at - 1], atol=1e-4 * size)
        last = runner.decode([1], [text[at]])


@pytest.mark.parametrize("precision", ["bf16", "int8", "dynamic-int8", "nf4"])
@pytest.mark.parametrize("name", ["local attention", "ALiBi"])
def test_it_is_quantized_as_any_other_model_is(name: str, precision: str, tmp_path: Path) -> None:
    family, sizes, _ = FAMILIES[name]
    spec = spec_of(family, sizes, tmp_path)
    text = [5 + at for at in range(40)]
    exact = loaders.load("fp32", spec).runner.score(text)
    loaded = loaders.load(precision, spec)
    assert isinstance(loaded.runner, SequentialRunner)
    assert loaded.footprint.quantized_share > 0.7 or precision == "bf16"
    error = float((loaded.runner.score(text) - exact).norm() / exact.norm())
    assert error < (0.8 if precision == "nf4" else 0.15)  # of unrelated logits: 1.4


def served(name: str, folder: Path) -> SequentialRunner:
    family, sizes, _ = FAMILIES[name]
    runner = loaders.load("fp32", spec_of(family, sizes, folder)).runner
    assert isinstance(runner, SequentialRunner)
    return runner


def test_a_sequence_that_fails_ends_alone_and_without_a_wrong_token(tmp_path: Path) -> None:
    runner = served("local attention", tmp_path)
    for slot in range(3):
        runner.prefill(slot, [5, 6, 7 + slot])
    expected = [runner.score([5, 6, 7 + slot, 8])[-1] for slot in range(3)]
    with pytest.raises(IndexError):
        runner.decode([0, 1, 2], [8, runner.vocabulary, 8])
    with pytest.raises(RuntimeError, match="a forward pass of this sequence failed"):
        runner.decode([1], [8])
    for slot in (0, 2):  # computed once, although slot 0 was before the failure
        assert torch.allclose(runner.decode([slot], [8])[0], expected[slot], atol=1e-4)
    runner.free(1)
    runner.prefill(1, [5, 6, 8])
    assert torch.allclose(runner.decode([1], [8])[0], expected[1], atol=1e-4)


def test_a_freed_slot_gives_its_memory_back_and_begins_anew(tmp_path: Path) -> None:
    runner = served("local attention", tmp_path)
    assert isinstance(runner, GrowingRunner)
    runner.prefill(0, [5, 6, 7])
    first = runner.kv_cache_bytes
    assert first == runner.sequence_bytes + 3 * runner.token_bytes
    assert full_cache_bytes(runner) == 3 * (runner.sequence_bytes + 128 * runner.token_bytes)
    kept = runner.decode([0], [8]).clone()
    assert runner.kv_cache_bytes == first + runner.token_bytes
    runner.free(0)
    runner.free(0)
    assert runner.kv_cache_bytes == 0
    runner.prefill(0, [5, 6, 7])
    assert torch.equal(runner.decode([0], [8]), kept)


def test_a_text_beyond_the_context_is_refused_before_it_is_computed(tmp_path: Path) -> None:
    runner = served("local attention", tmp_path)
    runner.prefill(0, [5] * 120, "none")
    with pytest.raises(ValueError, match="129 tokens do not fit a slot of 128"):
        runner.prefill(0, [5] * 9)
    with pytest.raises(ValueError, match="129 tokens do not fit a slot of 128"):
        runner.score([5] * 129)
    assert runner.prefill(0, [5] * 8) is not None


@pytest.mark.parametrize(
    ("family", "sizes", "why"),
    [
        ("bert", {**SIZES, "intermediate_size": 128}, "token by token it computes other logits"),
        ("openai-gpt", GPT, "its forward pass takes no cache"),
    ],
)  # fmt: skip
def test_what_has_no_steps_is_refused(family: str, sizes: dict[str, Any], why: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"can't be served here.*{why}"):
        loaders.load("fp32", spec_of(family, sizes, tmp_path))


def test_rotary_embeddings_that_change_with_the_length_are_not_computed_in_steps(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    config = Phi3Config(**GATED, pad_token_id=0, rope_parameters=rope, original_max_position_embeddings=64)
    model = AutoModelForCausalLM.from_config(config).eval()
    spec = ModelSpec(open_checkpoint(str(checkpoints.save(model, tmp_path / "phi3"))))
    with pytest.raises(CheckpointError, match="the reason"):
        SequentialRunner(model, spec, FORMS[0], "the reason")


def bloom(**stated: int) -> PreTrainedModel:
    sizes: dict[str, Any] = {"vocab_size": 320, "hidden_size": 64, "n_layer": 2, "n_head": 4, **stated}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", **sizes))
    return model


@pytest.mark.parametrize(
    ("stated", "expected"), [({"seq_length": 512}, 512), ({}, 2048), ({"seq_length": 0}, 2048)]
)
def test_a_family_without_positions_has_the_context_that_is_stated_or_usual(
    stated: dict[str, int], expected: int, tmp_path: Path
) -> None:
    folder = checkpoints.save(bloom(**stated), tmp_path / "bloom")
    assert open_checkpoint(str(folder)).context_length == expected
