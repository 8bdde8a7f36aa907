"""static-int8: constant scales of activations that calibration found."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import loaders
from loaders import kernels
from loaders.base import ModelSpec
from loaders.calibration import calibration_samples
from loaders.checkpoint import open_checkpoint
from loaders.layer_errors import layer_errors
from loaders.layers.static_int8 import OBSERVERS
from loaders.precisions import static_int8
from loaders.pretrained import load_pretrained
from loaders.runner import Runner
from loaders.runners.select import runner_for
from loaders.runners.transformers_runner import TransformersRunner
from loaders.texts.calibration import CalibrationError
from tests import checkpoints

pytestmark = pytest.mark.skipif(kernels.get() is None, reason=str(kernels.find()))
BUNDLED = open_checkpoint("bundled")


def ignore(stage: str, current: int, total: int) -> None:
    pass


@cache
def held_out() -> list[int]:
    ids: list[int] = AutoTokenizer.from_pretrained(BUNDLED.folder)(topics["assignment"])["input_ids"]
    return ids[:300]


def scored(runner: Runner) -> Tensor:
    """(tokens, vocabulary) log-probabilities."""
    return runner.score(held_out()).log_softmax(-1)


def perplexity(found: Tensor) -> float:
    return float(found[:-1].gather(-1, torch.tensor(held_out()[1:])[:, None]).mean().neg().exp())


def divergence(found: Tensor, exact: Tensor) -> float:
    return float((exact.exp() * (exact - found)).sum(-1).mean())


@cache
def samples() -> tuple[Tensor, ...]:
    spec = ModelSpec(BUNDLED, slots=1)
    return (*calibration_samples(spec, 4, 512), *calibration_samples(spec, 16, 64))


def converted(
    spec: ModelSpec, observers: Sequence[str] = OBSERVERS, least: float = static_int8.LEAST_SQNR_DB
) -> tuple[Any, Runner]:
    model = load_pretrained(spec, ignore, dtype=torch.float32, device_map="cpu")
    static_int8.convert(model, spec, samples(), ignore, observers, least)
    return model, runner_for(model, spec)


@pytest.fixture(scope="module")
def exact() -> Tensor:
    return scored(loaders.load("fp32", ModelSpec(BUNDLED, slots=1)).runner)


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """The bundled model's function; two values of every attention are × 256, the weights after them ÷ 256."""
    model: Any = AutoModelForCausalLM.from_pretrained(BUNDLED.folder)
    width = model.config.n_embd
    with torch.no_grad():
        for block in model.transformer.h:
            for channel in (3, width - 5):
                block.attn.c_attn.weight[:, 2 * width + channel] *= 256
                block.attn.c_attn.bias[2 * width + channel] *= 256
                block.attn.c_proj.weight[channel] /= 256
    folder = checkpoints.save(model, tmp_path_factory.mktemp("outliers"))
    return ModelSpec(open_checkpoint(str(folder)), slots=1)


def test_perplexity_is_within_5_percent_of_fp32(exact: Tensor) -> None:
    found = scored(converted(ModelSpec(BUNDLED, slots=1))[1])
    assert perplexity(found) <= 1.05 * perplexity(exact)
    assert divergence(found, exact) < 0.005


def test_outliers_ruin_plain_ranges_and_not_balanced_ones(exact: Tensor, outliers: ModelSpec) -> None:
    """No layer is left dynamic: the constant scales alone are compared."""
    plain = scored(converted(outliers, ["min-max"], least=-1e9)[1])
    assert perplexity(plain) > 1.05 * perplexity(exact)
    balanced = scored(converted(outliers, least=-1e9)[1])
    assert perplexity(balanced) <= 1.05 * perplexity(exact)
    assert divergence(balanced, exact) < divergence(plain, exact) / 10


def test_a_layer_below_the_least_sqnr_stays_dynamic_and_is_listed(outliers: ModelSpec) -> None:
    model, _ = converted(outliers, ["min-max"])
    dynamic = static_int8._calibrated(model)["dynamic_layers"]
    projections = {f"transformer.h.{i}.attn.c_proj" for i in range(model.config.n_layer)}
    assert projections <= dynamic.keys()
    for name, (static_db, dynamic_db) in dynamic.items():
        assert static_db < min(static_int8.LEAST_SQNR_DB, dynamic_db)
        assert model.get_submodule(name).kind == "int8"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    folder = checkpoints.save(checkpoints.llama(), tmp_path_factory.mktemp("llama"))
    text = tmp_path_factory.mktemp("text") / "calibration.txt"
    text.write_text("the rain in Spain stays mainly in the plain. " * 100)
    return ModelSpec(open_checkpoint(str(folder)), slots=2, calibration=text)


def test_the_second_load_calibrates_nothing_and_computes_the_same(small: ModelSpec, tmp_path: Path) -> None:
    spec = replace(small, artifacts=tmp_path)
    stages: list[str] = []
    first = loaders.load("static-int8", spec, lambda stage, *_: stages.append(stage))
    assert {"calibrating", "quantizing"} <= set(stages)
    stages.clear()
    second = loaders.load("static-int8", spec, lambda stage, *_: stages.append(stage))
    assert not {"calibrating", "quantizing"} & set(stages)
    assert torch.equal(first.runner.score([5, 6, 7]), second.runner.score([5, 6, 7]))
    assert second.details["calibration"]["text"] == "calibration.txt"
    assert first.details == second.details


def test_layers_of_one_input_share_its_constants_and_the_report_shows_them(
    small: ModelSpec, tmp_path: Path
) -> None:
    loaded = loaders.load("static-int8", replace(small, artifacts=tmp_path))
    module: Any = loaded.runner
    block = module.module.model.layers[0]
    attention, mlp = block.self_attn, block.mlp
    for one, *others in (
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (mlp.gate_proj, mlp.up_proj),
    ):
        assert {layer.input_factors.data_ptr() for layer in others} == {one.input_factors.data_ptr()}
    assert attention.o_proj.input_factors.data_ptr() != mlp.down_proj.input_factors.data_ptr()
    report = layer_errors(loaded, small)
    assert report is not None
    layers = {layer.name: layer for layer in report.layers}
    inputs = layers["model.layers.0.mlp.down_proj"].inputs
    assert inputs is not None
    assert inputs.observer in OBSERVERS
    assert inputs.low < 0 < inputs.high
    assert 0 < inputs.lowest_scale <= inputs.highest_scale
    assert 25 < inputs.sqnr_db < inputs.dynamic_sqnr_db + 5
    assert layers["lm_head"].inputs is None


def test_too_short_a_text_is_refused_before_weights_are_read(small: ModelSpec, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("the rain in Spain")
    stages: list[str] = []
    with pytest.raises(CalibrationError, match=r"short\.txt has \d+ tokens; 256 are the fewest"):
        loaders.load(
            "static-int8",
            replace(small, artifacts=tmp_path, calibration=text),
            lambda stage, *_: stages.append(stage),
        )
    assert not stages
    assert not list(tmp_path.glob("static-int8*/"))


def test_an_architecture_without_a_compiled_pass_is_served(small: ModelSpec, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "biogpt", vocab_size=checkpoints.VOCABULARY, hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128, initializer_range=0.2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    folder = checkpoints.save(AutoModelForCausalLM.from_config(config).eval(), tmp_path / "biogpt")
    spec = replace(small, checkpoint=open_checkpoint(str(folder)), artifacts=tmp_path / "made")
    loaded = loaders.load("static-int8", spec)
    assert isinstance(loaded.runner, TransformersRunner)
    assert loaded.footprint.quantized_share == 1
    ids = checkpoints.byte_tokenizer().encode("the plain in Spain stays mainly in the rain")
    found, expected = (one.runner.score(ids) for one in (loaded, loaders.load("fp32", spec)))
    assert float((found - expected).norm() / expected.norm()) < 0.1


@pytest.mark.parametrize(("dtype", "found"), [("auto", "int8"), ("fp32", "float32"), ("bf16", "bfloat16")])
def test_the_type_of_the_head(small: ModelSpec, tmp_path: Path, dtype: Any, found: str) -> None:
    loaded = loaders.load("static-int8", replace(small, artifacts=tmp_path, lm_head_dtype=dtype))
    assert loaded.details["head"] == f"torch.{found}"
    assert ("lm_head" in loaded.footprint.quantized) == (found == "int8")


def test_it_is_not_offered_without_the_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITDIAL_KERNELS", "torch")
    kernels.find.cache_clear()
    try:
        able = loaders.availability("static-int8", "cpu")
    finally:
        monkeypatch.undo()
        kernels.find.cache_clear()
    assert able.reason is not None
    assert "BITDIAL_KERNELS" in able.reason
    assert "CPU" in (loaders.availability("static-int8", "cuda").reason or "")
