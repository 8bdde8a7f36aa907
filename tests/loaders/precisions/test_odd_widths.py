"""Precisions of models whose layers have any width, among them DeepSeek's latent attention."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import loaders
from loaders import kernels
from loaders.base import ModelSpec
from loaders.checkpoint import open_checkpoint
from server.__main__ import main
from tests import checkpoints
from tests.loaders.test_suitability import GATED, LATENT, SIZES

IDS = [5, 6, 7, 9, 11, 4]
ODD = {"kv_lora_rank": 33, "q_lora_rank": 40, "v_head_dim": 12, "intermediate_size": 100}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "latent": ("deepseek_v3", {**SIZES, **LATENT}),
    "latent of 48": ("deepseek_v3", {**SIZES, **LATENT, "kv_lora_rank": 48}),
    "latent of odd widths": ("deepseek_v3", {**SIZES, **LATENT, **ODD}),
    "llama": ("llama", {**GATED, "intermediate_size": 33}),
    "gpt2": ("gpt2", {**SIZES, "hidden_size": 36}),
}
ROUNDED, FOUR_BITS = 0.05, 0.3
"""Distances from fp32's logits that rounding explains, relative to them; other logits are 1.4 away."""


@pytest.fixture(scope="module")
def spec_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelSpec]:
    folder = tmp_path_factory.mktemp("models")

    def make(name: str) -> ModelSpec:
        if not (folder / name).exists():
            torch.manual_seed(0)
            family, sizes = MODELS[name]
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()
            checkpoints.save(model, folder / name)
        return ModelSpec(open_checkpoint(str(folder / name)), slots=2)

    return make


@pytest.fixture(params=["compiled", "torch"])
def computed_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The compiled kernels, or none."""
    if request.param == "torch":
        monkeypatch.setenv("BITDIAL_KERNELS", "torch")
        kernels.find.cache_clear()
    elif kernels.get() is None:
        pytest.skip(str(kernels.find()))
    yield request.param
    monkeypatch.undo()
    kernels.find.cache_clear()


def scored(precision: str, spec: ModelSpec) -> torch.Tensor:
    model = loaders.load(precision, spec)
    try:
        return model.runner.score(IDS)
    finally:
        model.close()


def distance(precision: str, spec: ModelSpec, original: ModelSpec) -> float:
    expected = scored("fp32", original)
    return float((scored(precision, spec) - expected).norm() / expected.norm())


@pytest.mark.usefixtures("computed_by")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", ["int8", "dynamic-int8", "torchao-int8"])
def test_eight_bits_take_any_width(precision: str, name: str, spec_of: Callable[[str], ModelSpec]) -> None:
    spec = spec_of(name)
    if not loaders.availability(precision, "cpu").ok:
        pytest.skip("not on this host")
    assert loaders.offered(precision, spec).ok
    assert distance(precision, spec, spec) < ROUNDED


@pytest.mark.parametrize("name", ["latent", "latent of odd widths"])
def test_int8_takes_latent_attention_with_outliers_and_saved(
    name: str, spec_of: Callable[[str], ModelSpec], tmp_path: Path
) -> None:
    """As ``from_pretrained`` makes it, not the loader."""
    spec = spec_of(name)
    assert distance("int8", replace(spec, int8_threshold=6.0), spec) < ROUNDED
    out = str(tmp_path / "saved")
    assert main(["quantize", "--model", str(spec.checkpoint.folder), "--method", "int8", "--out", out]) == 0
    assert distance("int8", ModelSpec(open_checkpoint(out), slots=2), spec) < ROUNDED


@pytest.mark.usefixtures("computed_by")
@pytest.mark.parametrize("precision", ["nf4", "fp4"])
def test_four_bits_take_any_number_of_outputs(precision: str, spec_of: Callable[[str], ModelSpec]) -> None:
    """``kv_a_proj_with_mqa`` has 80, which bitsandbytes' layout for AVX-512 can't hold."""
    spec = spec_of("latent")
    assert distance(precision, spec, spec) < FOUR_BITS


@pytest.mark.skipif(kernels.get() is None, reason=str(kernels.find()))
def test_a_layer_that_static_int8_keeps_says_that_its_width_is_why(
    spec_of: Callable[[str], ModelSpec], tmp_path: Path
) -> None:
    spec = replace(
        spec_of("latent of odd widths"),
        artifacts=tmp_path,
        calibration=checkpoints.calibration_text(tmp_path),
    )
    model = loaders.load("static-int8", spec)
    kept = {layer.name.rpartition(".")[2]: layer.reason for layer in model.footprint.kept}
    model.close()
    odd = {"kv_b_proj", "q_b_proj", "down_proj"}
    assert {name for name, why in kept.items() if "don't take its number of inputs" in why} >= odd
