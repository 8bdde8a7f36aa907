"""Models with recurrent layers are batched as others are: each slot keeps its own state."""

from pathlib import Path
from typing import Any

import pytest
import torch

import loaders
from loaders.runners.transformers_runner import TransformersRunner
from tests.loaders.test_families import GATED, generated, greedy, spec_of

DELTA = {
    **GATED, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gated delta rule": ("qwen3_5_text", DELTA),
    "convolutions": ("lfm2", {**GATED, "layer_types": ["conv", "full_attention"]}),
    "mamba beside attention": ("bamba", {**GATED, **MAMBA, "attn_layer_indices": [1]}),
    "mamba and attention in one layer": ("falcon_h1", {**GATED, **MAMBA, "head_dim": 16, "mamba_d_ssm": 128}),
    "mamba alone": (
        "mamba2",
        {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16, "num_heads": 8,
         "head_dim": 16, "n_groups": 1, "eos_token_id": 0},
    ),
}  # fmt: skip


def served(name: str, folder: Path, precision: str = "fp32") -> TransformersRunner:
    runner = loaders.load(precision, spec_of(*FAMILIES[name], folder)).runner
    assert isinstance(runner, TransformersRunner)
    return runner


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_a_batch_get_the_tokens_that_they_get_alone(name: str, tmp_path: Path) -> None:
    loaded = loaders.load("fp32", spec_of(*FAMILIES[name], tmp_path))
    assert isinstance(loaded.runner, TransformersRunner)
    assert greedy(loaded, 8) == generated(loaded.runner.module, 8)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_slot_is_used_again_and_rows_come_in_any_order(name: str, tmp_path: Path) -> None:
    runner = served(name, tmp_path)
    texts = {0: [5, 6, 7, 8], 1: list(range(40, 60)), 2: [9, 10, 11]}
    for slot, text in {**texts, 1: [300] * 30}.items():
        runner.prefill(slot, text)
    runner.free(1)
    runner.prefill(1, texts[1])
    for order in ([2, 0], [1], [1, 2, 0], [0, 1]):
        found = runner.decode(order, [20 + slot for slot in order])
        for row, slot in enumerate(order):
            texts[slot] = [*texts[slot], 20 + slot]
            expected = runner.score(texts[slot])[-1]
            assert torch.allclose(found[row], expected, atol=1e-4 * float(expected.norm()))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_failed_pass_leaves_the_states_as_they_were(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = served(name, tmp_path)
    for slot in range(2):
        runner.prefill(slot, [5, 6, 7 + slot])

    def failing(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("the last layer fails")

    with monkeypatch.context() as patched:
        patched.setattr(runner.module.get_output_embeddings(), "forward", failing)
        with pytest.raises(RuntimeError, match="the last layer fails"):
            runner.decode([0, 1], [8, 8])
    found = runner.decode([0, 1], [8, 8])
    for slot in range(2):
        expected = runner.score([5, 6, 7 + slot, 8])[-1]
        assert torch.allclose(found[slot], expected, atol=1e-4 * float(expected.norm()))


@pytest.mark.parametrize("precision", ["bf16", "fp16", "int8", "dynamic-int8", "nf4"])
@pytest.mark.parametrize("name", ["gated delta rule", "convolutions"])
def test_it_is_quantized_as_any_other_model_is(name: str, precision: str, tmp_path: Path) -> None:
    exact = served(name, tmp_path)
    runner = served(name, tmp_path, precision)
    text = [5 + at for at in range(40)]
    scored, expected = runner.score(text), exact.score(text)
    error = float((scored - expected).norm() / expected.norm())
    assert error < (0.8 if precision == "nf4" else 0.15)  # of unrelated logits: 1.4
    runner.prefill(0, text[:25], "none")
    runner.prefill(0, text[25:39], "none")
    stepped = runner.decode([0], text[39:])[0]
    assert float((stepped - scored[-1]).norm() / scored[-1].norm()) < 0.05


def test_states_count_as_memory(tmp_path: Path) -> None:
    runner = served("mamba alone", tmp_path)
    assert runner.kv_cache_bytes == 0
    runner.prefill(0, [5, 6, 7])
    heads, width, state = 8, 16, 16
    channels, kernel = heads * width + 2 * state, 4
    assert runner.kv_cache_bytes == 3 * 2 * 4 * (heads * width * state + channels * kernel)
