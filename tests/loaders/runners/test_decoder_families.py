"""Every architecture of the compiled runner, from a checkpoint: ``generate``'s tokens, isolated rows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import loaders
from loaders import kernels
from loaders.base import LoadedModel, ModelSpec
from loaders.checkpoint import open_checkpoint
from loaders.runners.decoder_cpu_runner import DecoderCPURunner
from loaders.runners.transformers_runner import TransformersRunner
from tests import checkpoints, decoders

pytestmark = pytest.mark.skipif(kernels.get() is None, reason=str(kernels.find()))

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
PROMPTS = [[5, 6, 7, 8], list(range(20, 80)), [9] * 17]
# inputs of every layer are a multiple of the 64 that int8's kernel and nf4's blocks need
_WHOLE_BLOCKS = {
    "opt": {"ffn_dim": 384},
    "qwen3": {"intermediate_size": 384, "head_dim": 64},
    "gemma": {"intermediate_size": 384, "head_dim": 48},
}
OTHERS = ["mistral", "qwen2", "qwen3", "phi3", "gemma", "gpt_neox", "opt"]
PRECISIONS = ["fp32", "bf16", "fp16", "int8", "nf4", "fp4", "dynamic-int8", "int4"]


def spec_of(name: str, folder: Path, **changes: Any) -> ModelSpec:
    checkpoint = open_checkpoint(str(checkpoints.save(decoders.make(name, **changes), folder / "model")))
    text = checkpoints.calibration_text(folder)
    return ModelSpec(checkpoint, slots=len(PROMPTS), calibration=text, artifacts=folder)


def greedy(model: LoadedModel, prompts: dict[int, list[int]], count: int) -> dict[int, list[int]]:
    """Greedy ids of prompts by slot, in one batch, prefilled in chunks of seven."""
    runner, found = model.runner, {}
    for slot, prompt in prompts.items():
        for start in range(0, len(prompt), 7):
            logits = runner.prefill(slot, prompt[start : start + 7])
        assert logits is not None
        found[slot] = [int(logits.argmax())]
    for _ in range(count - 1):
        chosen = runner.decode(list(found), [ids[-1] for ids in found.values()]).argmax(-1).tolist()
        for ids, id_ in zip(found.values(), chosen, strict=True):
            ids.append(id_)
    for slot in found:
        runner.free(slot)
    return found


@pytest.mark.parametrize("name", decoders.CONFIGS)
def test_greedy_tokens_are_those_of_generate(name: str, tmp_path: Path) -> None:
    spec = spec_of(name, tmp_path)
    model = loaders.load("fp32", spec)
    assert isinstance(model.runner, DecoderCPURunner)
    reference = AutoModelForCausalLM.from_pretrained(spec.checkpoint.folder, dtype=torch.float32).eval()
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = greedy(model, dict(enumerate(PROMPTS)), 20)
    for slot, prompt in enumerate(PROMPTS):
        expected = reference.generate(torch.tensor([prompt]), **options)[0, len(prompt) :]
        assert found[slot] == expected.tolist()


@pytest.mark.parametrize(
    ("name", "precision"),
    [("llama", precision) for precision in PRECISIONS]
    + [(name, precision) for name in OTHERS for precision in ("fp32", "nf4", "dynamic-int8", "int4")],
)
def test_rows_are_isolated(name: str, precision: str, tmp_path: Path) -> None:
    """Bit for bit: a row alone, in a batch, and its prompt in one pass or in chunks."""
    sizes = _WHOLE_BLOCKS.get(name, {"intermediate_size": 384})
    if precision == "int4":  # is calibrated: every token of the tokenizer has an embedding
        sizes = {**sizes, "vocab_size": checkpoints.VOCABULARY}
    model = loaders.load(precision, spec_of(name, tmp_path, **sizes))
    runner = model.runner
    assert isinstance(runner, DecoderCPURunner)
    together = greedy(model, dict(enumerate(PROMPTS)), 12)
    assert together == {slot: greedy(model, {slot: ids}, 12)[slot] for slot, ids in enumerate(PROMPTS)}
    whole = runner.score(PROMPTS[1])
    runner.prefill(0, PROMPTS[1][:33], "none")
    runner.prefill(2, PROMPTS[2], "none")
    part = runner.prefill(0, PROMPTS[1][33:-1], "all")
    assert part is not None
    assert torch.equal(part, whole[33:-1])
    assert torch.equal(runner.decode([2, 0], [7, PROMPTS[1][-1]])[1], whole[-1])


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("llama", {"hidden_act": "gelu_10"}, "activation is 'gelu_10'"),
        ("llama", {"rope_parameters": DYNAMIC}, "rotary positions are of type 'dynamic'"),
        ("llama", {"head_dim": 20}, "head dimension 20"),
        ("llama", {"hidden_size": 204}, "width 204"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "not GPT-2's standard one"),
        ("opt", {"word_embed_proj_dim": 96}, "projected to another width"),
    ],
)  # fmt: skip
def test_what_it_cannot_compute_runs_on_transformers_forward(
    name: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    spec = spec_of(name, tmp_path, **changes)
    runner = loaders.load("fp32", spec).runner
    assert isinstance(runner, TransformersRunner)
    assert reason in str(runner.report())
    reference = AutoModelForCausalLM.from_pretrained(spec.checkpoint.folder, dtype=torch.float32).eval()
    expected = reference(torch.tensor([PROMPTS[1]])).logits[0]
    torch.testing.assert_close(runner.score(PROMPTS[1]), expected, rtol=1e-3, atol=1e-3)
