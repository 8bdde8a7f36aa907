"""int4: what it refuses before any work, which layers are int8, and that its file is made once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import loaders
from loaders import kernels
from loaders.base import ModelSpec
from loaders.checkpoint import load_tokenizer, open_checkpoint
from loaders.errors import LoaderError, PrecisionUnavailable
from loaders.layers.int4_rounding import quantize
from tests import checkpoints, decoders
from tests.loaders.layer_products import weights_in
from tests.loaders.topics import split_topics

SIZES = {"intermediate_size": 384, "vocab_size": checkpoints.VOCABULARY}
needs_kernels = pytest.mark.skipif(kernels.get() is None, reason=str(kernels.find()))


def spec_of(folder: Path, model: Any, **options: Any) -> ModelSpec:
    saved = checkpoints.save(model, folder / "model")
    text = checkpoints.calibration_text(folder)
    return ModelSpec(
        open_checkpoint(str(saved)), slots=2, calibration=text, artifacts=folder / "made", **options
    )


@needs_kernels
def test_the_made_file_serves_a_second_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(tmp_path, decoders.make("llama", **SIZES))
    first = loaders.load("int4", spec)
    monkeypatch.setattr("loaders.precisions.int4.quantize_model", None)
    second = loaders.load("int4", spec)
    assert torch.equal(first.runner.score([5, 6, 7]), second.runner.score([5, 6, 7]))
    assert first.footprint == second.footprint


@needs_kernels
def test_the_same_text_gives_the_same_bytes(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, checkpoints.gpt2())
    files = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        loaders.loader("int4").make("int4", spec, tmp_path / name, lambda *_: None)  # type: ignore[attr-defined]
        files.append((tmp_path / name / "quantized.safetensors").read_bytes())
    assert files[0] == files[1]


@needs_kernels
def test_sensitive_layers_and_the_head_are_int8(tmp_path: Path) -> None:
    model = loaders.load("int4", spec_of(tmp_path, decoders.make("llama", **SIZES)))
    int8 = {name for name in model.footprint.quantized if weights_in(model, name).format == "int8"}
    ends = {"model.embed_tokens", "lm_head"}
    kinds = {name.rpartition(".")[2] for name in int8 - ends}
    assert ends < int8
    assert kinds == {"down_proj", "v_proj"}


@needs_kernels
@pytest.mark.parametrize(
    ("model", "changes", "reason"),
    [
        ("llama", {"intermediate_size": 320 + 32}, "352 inputs, no multiple of 64"),
        (
            "mixtral",
            {"num_local_experts": 2, "num_experts_per_tok": 1},
            "in no linear layers .a mixture of experts",
        ),
    ],
)
def test_what_it_cannot_quantize_is_refused_before_any_work(
    model: str, changes: dict[str, Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 320}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, **changes}
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(model, **sizes))
    spec = spec_of(tmp_path, made)
    monkeypatch.setattr("loaders.precisions.int4.calibration_samples", None)
    with pytest.raises(PrecisionUnavailable, match=reason) as raised:
        loaders.load("int4", spec)
    assert "\n" not in str(raised.value)


def without_blocks() -> Any:
    """A decoder whose configuration counts the layers of the encoder that it was made with."""
    sizes = {"d_model": 64, "vocab_size": checkpoints.VOCABULARY, "max_position_embeddings": 64}
    for part, layers in (("encoder", 1), ("decoder", 3)):
        sizes |= {f"{part}_layers": layers, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 128}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("bart", **sizes))


@needs_kernels
@pytest.mark.parametrize("precision", ["int4", "onnx-int4"])
def test_a_model_without_a_list_of_blocks_has_an_estimate_and_is_refused(
    precision: str, tmp_path: Path
) -> None:
    model = without_blocks()
    spec = spec_of(tmp_path, model)
    if (able := loaders.availability(precision, "cpu")).reason is not None:
        pytest.skip(able.reason)
    in_float = 4 * sum(one.numel() for one in model.parameters())
    estimate = loaders.loader(precision).estimate_bytes(precision, spec)
    assert 0.1 * in_float < estimate < 1.1 * in_float
    with pytest.raises(PrecisionUnavailable, match="BartForCausalLM has no list of blocks to calibrate"):
        loaders.load(precision, spec)


@needs_kernels
def test_a_text_too_short_to_calibrate_on_is_refused(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, checkpoints.gpt2())
    assert spec.calibration is not None
    spec.calibration.write_text("Too short.")
    with pytest.raises(LoaderError, match="calibration text"):
        loaders.load("int4", spec)


def test_without_the_kernels_availability_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITDIAL_KERNELS", "torch")
    kernels.find.cache_clear()
    try:
        able = loaders.availability("int4", "cpu")
    finally:
        monkeypatch.undo()
        kernels.find.cache_clear()
    assert able.reason is not None
    assert "compiled CPU kernels: switched off by BITDIAL_KERNELS=torch" in able.reason


def test_on_a_card_it_names_its_like() -> None:
    assert "nf4" in str(loaders.availability("int4", "cuda").reason)


@needs_kernels
@pytest.mark.slow
def test_calibration_brings_the_bundled_model_nearer_to_fp32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Than rounding the same layers to the nearest code, which in turn is nearer than nf4."""
    text = tmp_path / "text.txt"
    held_out = split_topics(text)
    spec = ModelSpec(open_checkpoint("bundled"), slots=1, calibration=text, artifacts=tmp_path / "calibrated")
    ids = load_tokenizer(spec.checkpoint)(held_out)["input_ids"][:400]
    exact = loaders.load("fp32", spec).runner.score(ids).log_softmax(-1)

    def divergence(precision: str, spec: ModelSpec) -> float:
        found = loaders.load(precision, spec).runner.score(ids).log_softmax(-1)
        return float((exact.exp() * (exact - found)).sum(-1).mean())

    calibrated, blockwise = divergence("int4", spec), divergence("nf4", spec)
    monkeypatch.setattr("loaders.precisions.int4.quantize", lambda weight, hessian: quantize(weight, None))
    nearest = divergence("int4", replace(spec, artifacts=tmp_path / "nearest"))
    assert calibrated < 0.7 * nearest < 0.4 * blockwise
