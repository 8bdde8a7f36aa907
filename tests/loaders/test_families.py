"""Other architectures than GPT-2 and Llama: served correctly, or refused with the reason."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import loaders
from loaders import kernels
from loaders.base import LoadedModel, ModelSpec
from loaders.checkpoint import open_checkpoint
from loaders.footprint import quantization_warning
from tests import checkpoints

SIZES: dict[str, Any] = {
    "vocab_size": checkpoints.VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
GATED = {**SIZES, "intermediate_size": 128, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {**GATED, "tie_word_embeddings": True},  # biases on three of four projections
    "gemma2": {**GATED, "head_dim": 16, "sliding_window": 16},  # attention in eager mode, two kinds of layers
    "gpt_neox": {**SIZES, "intermediate_size": 128},
    "opt": {**SIZES, "ffn_dim": 128, "word_embed_proj_dim": 64, "init_std": 0.2},
    "biogpt": {**SIZES, "intermediate_size": 128},  # a head of another name
    "mixtral": {**GATED, "num_local_experts": 4, "num_experts_per_tok": 2},
}
LOCAL = {
    "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 16,
}  # fmt: skip
PROMPTS = [[5, 6, 7, 8], list(range(40, 80)), [9] * 17]


def spec_of(family: str, sizes: dict[str, Any], folder: Path) -> ModelSpec:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return ModelSpec(open_checkpoint(str(checkpoints.save(model, folder / family))), slots=len(PROMPTS))


def greedy(loaded: LoadedModel, count: int) -> list[list[int]]:
    """Greedy ids of all prompts in one batch, prefilled in chunks of seven."""
    runner, found = loaded.runner, []
    for slot, prompt in enumerate(PROMPTS):
        for start in range(0, len(prompt), 7):
            logits = runner.prefill(slot, prompt[start : start + 7])
        assert logits is not None
        found.append([int(logits.argmax())])
    for _ in range(count - 1):
        chosen = runner.decode(range(len(PROMPTS)), [ids[-1] for ids in found]).argmax(-1).tolist()
        for ids, id_ in zip(found, chosen, strict=True):
            ids.append(id_)
    return found


def generated(model: Any, count: int) -> list[list[int]]:
    """``greedy`` by ``transformers``, each prompt alone."""
    options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = [model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :] for prompt in PROMPTS]
    return [ids.tolist() for ids in found]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate(family: str, tmp_path: Path) -> None:
    spec = spec_of(family, FAMILIES[family], tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(spec.checkpoint.folder, dtype=torch.float32).eval()
    assert greedy(loaders.load("fp32", spec), 8) == generated(reference, 8)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["nf4", "dynamic-int8"])
def test_every_linear_layer_is_quantized_and_the_rest_is_listed(
    family: str, precision: str, tmp_path: Path
) -> None:
    spec = spec_of(family, FAMILIES[family], tmp_path)
    loaded = loaders.load(precision, spec)
    assert all(torch.isfinite(loaded.runner.score(prompt)).all() for prompt in PROMPTS)
    heads = {"biogpt": "output_projection"}
    kept = {layer.name: layer.reason for layer in loaded.footprint.kept}
    embeddings = {name for name, reason in kept.items() if "looked up" in reason}
    experts = {name for name, reason in kept.items() if "not a linear layer" in reason}
    assert all("emb" in name for name in embeddings)
    assert bool(experts) == (family == "mixtral")
    quantized = (
        precision == "dynamic-int8" or kernels.get() is not None
    )  # at four bits the head is int8 there
    assert kept.keys() - embeddings - experts == (set() if quantized else {heads.get(family, "lm_head")})


def test_experts_that_were_not_quantized_are_most_of_a_mixture(tmp_path: Path) -> None:
    loaded = loaders.load("nf4", spec_of("mixtral", FAMILIES["mixtral"], tmp_path))
    assert 0 < loaded.footprint.quantized_share < 0.5
    warning = quantization_warning(loaded)
    assert warning is not None
    assert warning.startswith("nf4 has quantized only")
    assert quantization_warning(loaders.load("nf4", spec_of("qwen2", FAMILIES["qwen2"], tmp_path))) is None


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_forward_pass_around_its_base_model_is_checked_in_16_bits_too(
    precision: str, tmp_path: Path
) -> None:
    """OPT's calls a part of its base model, not that; a projected embedding is not the compiled one's."""
    spec = spec_of("opt", {**FAMILIES["opt"], "word_embed_proj_dim": 32}, tmp_path)
    exact, found = (loaders.load(name, spec).runner.score([5, 6, 7]) for name in ("fp32", precision))
    assert float((found - exact).norm() / exact.norm()) < 0.1
