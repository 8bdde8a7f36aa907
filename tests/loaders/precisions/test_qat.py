"""Quantization-aware training: better than rounding, resumable, and exactly what is served."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM, PreTrainedModel

import loaders
from loaders import kernels, training
from loaders.artifacts import NotPrepared, prepare
from loaders.artifacts.native_weights import QUANTIZED
from loaders.base import ModelSpec, Progress, ignore_progress
from loaders.calibration import calibration_samples
from loaders.checkpoint import open_checkpoint
from loaders.errors import LoaderError, PrecisionUnavailable
from loaders.layers.fake_quantize import FakeQuantizedLinear
from loaders.layers.layer_weights import weights_of
from loaders.precisions import qat
from loaders.pretrained import load_pretrained
from tests import checkpoints, decoders

pytestmark = pytest.mark.skipif(kernels.get() is None, reason=str(kernels.find()))


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    folder = checkpoints.save(checkpoints.gpt2(), tmp_path_factory.mktemp("m") / "tiny")
    text, artifacts = checkpoints.calibration_text(folder), tmp_path_factory.mktemp("artifacts")
    return ModelSpec(
        open_checkpoint(str(folder)), slots=2, calibration=text, artifacts=artifacts, training_steps=24
    )


@pytest.fixture(scope="module")
def teacher(spec: ModelSpec) -> PreTrainedModel:
    return original(spec)


@pytest.fixture(scope="module", params=["qat-int8", "qat-int4"])
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def original(spec: ModelSpec) -> PreTrainedModel:
    model = load_pretrained(spec, ignore_progress, dtype=torch.float32, device_map="cpu")
    return model.requires_grad_(False)


def untrained(precision: str, spec: ModelSpec) -> PreTrainedModel:
    model = original(spec)
    qat.insert(precision, model, spec)
    return model


def train(
    precision: str, spec: ModelSpec, teacher: PreTrainedModel, state: Path, progress: Progress
) -> PreTrainedModel:
    model, texts = untrained(precision, spec), calibration_samples(spec, 64, 32)
    training.distil(model, teacher, qat.trained(model), texts, qat.plan(precision, spec), state, progress)
    return model


def make(precision: str, spec: ModelSpec, progress: Progress = ignore_progress) -> Path:
    return prepare(spec, qat.recipe(precision, spec), partial(qat.make, precision, spec), progress)


def divergence(spec: ModelSpec, teacher: PreTrainedModel, model: PreTrainedModel) -> float:
    """From the teacher's distributions, on texts between those that were trained on."""
    ids = calibration_samples(spec, 64, 32).roll(-16)
    with torch.no_grad():
        expected, found = (one(ids).logits.log_softmax(-1) for one in (teacher, model))
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def test_training_in_four_bits_is_better_than_rounding(
    spec: ModelSpec, teacher: PreTrainedModel, tmp_path: Path
) -> None:
    """Rounding is with the best of many scales for each block, not with the widest."""
    rounded = divergence(spec, teacher, untrained("qat-int4", spec))
    trained = divergence(spec, teacher, train("qat-int4", spec, teacher, tmp_path / "state", ignore_progress))
    assert 0 < trained < 0.7 * rounded


@pytest.mark.parametrize(
    ("precision", "granularity", "apart"),
    [
        ("qat-int8", "group", 0.002),
        ("qat-int8", "channel", 0.02),  # activations are rounded finer than in training
        ("qat-int4", "group", 0.03),  # the four-bit kernels multiply in bfloat16
    ],
)
def test_what_is_served_is_what_was_trained(
    precision: str, granularity: str, apart: float, spec: ModelSpec, teacher: PreTrainedModel, tmp_path: Path
) -> None:
    """Every weight is bit for bit the one that the last step of the training computed with."""
    few = replace(spec, training_steps=3, granularity=granularity)  # type: ignore[arg-type]
    model = train(precision, few, teacher, tmp_path / "state", ignore_progress)
    expected = {
        name: module.quantized_weight().detach()
        for name, module in model.named_modules()
        if isinstance(module, FakeQuantizedLinear)
    }
    ids = torch.arange(40, 72)[None]
    with torch.no_grad():
        logits = model(ids).logits
    qat.convert(model)
    assert len(expected) == 9
    for name, weight in expected.items():
        served = weights_of(model.get_submodule(name))
        assert served is not None
        assert torch.equal(served.dequantize(), weight), name
    with torch.no_grad():
        difference = (model(ids).logits - logits).norm() / logits.norm()
    assert difference < apart


class Interrupted(Exception):
    pass


def interrupt_at(step: int) -> Progress:
    def progress(stage: str, current: int, total: int) -> None:
        if stage.startswith("training") and current == step:
            raise Interrupted

    return progress


def test_interrupted_training_continues_to_the_same_weights(
    precision: str, spec: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    few = replace(spec, training_steps=5)
    straight = make(precision, replace(few, artifacts=tmp_path / "a"))
    resumed = replace(few, artifacts=tmp_path / "b")
    with pytest.raises(Interrupted):
        make(precision, resumed, interrupt_at(4))
    assert not any(path.is_dir() for path in (tmp_path / "b").iterdir())
    steps: list[int] = []
    folder = make(precision, resumed, lambda stage, at, _: steps.append(at) if "loss" in stage else None)
    assert steps == [4, 5]  # the state after step 3 was the last one saved
    expected, found = (load_file(one / QUANTIZED) for one in (straight, folder))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not [*(tmp_path / "b").glob("*.training*")]


def test_a_damaged_state_is_not_used(spec: ModelSpec, tmp_path: Path) -> None:
    few = replace(spec, training_steps=2, artifacts=tmp_path)
    place = tmp_path / f"{make('qat-int4', few).name}.training"
    place.write_bytes(b"damaged")
    for made in tmp_path.glob("qat-int4-*"):
        if made.is_dir():
            (made / QUANTIZED).write_bytes(b"")
    steps: list[int] = []
    make("qat-int4", few, lambda stage, at, _: steps.append(at) if "loss" in stage else None)
    assert steps == [1, 2]


def test_it_is_not_trained_by_loading(spec: ModelSpec, tmp_path: Path) -> None:
    with pytest.raises(NotPrepared, match="bitdial quantize --model tiny --method qat-int4"):
        loaders.load("qat-int4", replace(spec, artifacts=tmp_path))


def gpt2(width: int, layers: int) -> PreTrainedModel:
    config = GPT2Config(vocab_size=320, n_positions=64, n_embd=width, n_layer=layers, n_head=2)
    model: PreTrainedModel = GPT2LMHeadModel(config)
    return model


def mixture() -> PreTrainedModel:
    config = MixtralConfig(
        vocab_size=320, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=64,
    )  # fmt: skip
    model: PreTrainedModel = MixtralForCausalLM(config)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (partial(gpt2, 96, 1), r"h\.0\.attn\.c_attn has 96 inputs, no multiple of 64"),
        (mixture, r"qat-int4 can't be served here: model.*mlp.* is in no linear layer \(as the experts"),
    ],
)
def test_models_that_cannot_be_trained(
    model: Callable[[], PreTrainedModel], message: str, tmp_path: Path
) -> None:
    folder = checkpoints.save(model(), tmp_path / "m")
    with pytest.raises(PrecisionUnavailable, match=message):
        loaders.load("qat-int4", ModelSpec(open_checkpoint(str(folder)), artifacts=tmp_path / "a"))


def test_a_model_without_linear_layers(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qat, "meta_model", lambda _: gpt2(64, 0))
    able = loaders.offered("qat-int8", replace(spec, training_steps=9))
    assert able.reason == "the model has no linear layer beside its head"


@pytest.mark.parametrize("steps", [0, -3])
def test_no_steps(spec: ModelSpec, steps: int, tmp_path: Path) -> None:
    with pytest.raises(LoaderError, match=f"at least one training step, not {steps}"):
        make("qat-int8", replace(spec, training_steps=steps, artifacts=tmp_path))


def test_too_little_text(spec: ModelSpec, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("The train leaves at noon. " * 8)
    with pytest.raises(LoaderError, match="tokens, too few to train on: 512 are the fewest"):
        make("qat-int8", replace(spec, calibration=text, artifacts=tmp_path / "a"))


@pytest.mark.parametrize("name", ["llama", "mistral", "opt", "gpt_neox"])
def test_families_are_trained_and_computed_by_the_kernels(name: str, tmp_path: Path) -> None:
    folder = checkpoints.save(decoders.make(name, vocab_size=320), tmp_path / "m")
    text = checkpoints.calibration_text(tmp_path)
    spec = ModelSpec(
        open_checkpoint(str(folder)), slots=2, calibration=text, artifacts=tmp_path / "a", training_steps=1
    )
    make("qat-int8", spec)
    loaded = loaders.load("qat-int8", spec)
    assert type(loaded.runner).__name__ == "DecoderCPURunner"
    assert loaded.footprint.quantized_share == 1
    assert loaded.details["training_steps"] == 1


def test_the_granularity_of_a_training_is_kept_with_it(spec: ModelSpec, tmp_path: Path) -> None:
    few = replace(spec, training_steps=1, artifacts=tmp_path)
    places = [make("qat-int8", replace(few, granularity=one)) for one in ("group", "channel")]
    assert places[0] != places[1]
    assert loaders.load("qat-int8", replace(few, granularity="channel")).details["granularity"] == "channel"
    assert loaders.load("qat-int8", few).details["granularity"] == "group"
