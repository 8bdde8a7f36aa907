"""The check of positions and masks: models with outliers pass it in every precision, lost positions don't."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import loaders
from loaders.base import ModelSpec
from loaders.checkpoint import open_checkpoint
from loaders.errors import CheckpointError, LoaderError
from loaders.runners import batching_check, select
from loaders.runners.full_precision import full_precision
from loaders.runners.sequential_runner import SequentialRunner
from loaders.runners.transformers_runner import TransformersRunner
from tests import checkpoints
from tests.loaders.test_families import LOCAL, SIZES

# trained precisions aren't made by loading; ONNX graphs have a check of their own
IN_MODULES = [name for name in loaders.available("cpu") if not name.startswith(("qat-", "onnx-", "litert-"))]
ALIBI: dict[str, dict[str, Any]] = {
    "bloom": {**SIZES, "n_layer": 2, "n_head": 4},
    "falcon": {**SIZES, "alibi": True},
}


def with_outliers(model: LlamaForCausalLM, factor: float = 100.0) -> LlamaForCausalLM:
    """The same function with two channels of every norm × factor, and the next layers' inputs ÷ factor."""
    channels = [3, 40]
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, following in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                norm.weight[channels] *= factor
                for linear in following:
                    linear.weight[:, channels] /= factor
    return model


def deep_llama(layers: int = 6) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=checkpoints.VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        initializer_range=0.2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def spec_of(model: PreTrainedModel, folder: Path) -> ModelSpec:
    checkpoint = open_checkpoint(str(checkpoints.save(model, folder / "tiny")))
    return ModelSpec(checkpoint, slots=2, calibration=checkpoints.calibration_text(folder))


@pytest.fixture
def transformers_forward(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Loads every model with transformers' forward, which is checked; the deviations that the check found."""
    found: list[float] = []
    difference = batching_check._difference

    def recorded(*arguments: Any) -> float:
        found.append(difference(*arguments))
        return found[-1]

    monkeypatch.setattr(batching_check, "_difference", recorded)
    return found


def checked(precision: str, spec: ModelSpec) -> TransformersRunner:
    """The precision's model behind transformers' forward, checked, whichever runner serves it."""
    runner: Any = loaders.load(precision, spec).runner
    found = select._uncompiled(runner.module, spec, "a test")
    assert isinstance(found, TransformersRunner)
    return found


@pytest.mark.parametrize("precision", IN_MODULES)
def test_outliers_are_no_lost_positions(
    precision: str, tmp_path: Path, transformers_forward: list[float]
) -> None:
    spec = spec_of(with_outliers(deep_llama()), tmp_path)
    runner = checked(precision, spec)
    assert transformers_forward[-1] < 1e-4
    assert runner.score([5, 6, 7]).isfinite().all()


def test_the_rounding_of_int8_alone_would_look_like_lost_positions(tmp_path: Path) -> None:
    """The reason for the check's float32: the same comparison in the model's own arithmetic."""
    spec = spec_of(with_outliers(deep_llama(layers=24)), tmp_path)
    runner: Any = loaders.load("dynamic-int8", spec).runner
    own = TransformersRunner(runner.module, spec)
    deviation = batching_check._difference(own, batching_check._texts(own, spec.checkpoint.config))
    assert deviation > 2 * batching_check._TOLERANCE


def not_batched(precision: str, spec: ModelSpec) -> str:
    """The reason that the model is served one sequence at a time."""
    runner = loaders.load(precision, spec).runner
    assert isinstance(runner, SequentialRunner)
    return str(runner.report()["not_batched_because"])


def derives_its_own(family: str, folder: Path) -> ModelSpec:
    """A model that derives masks or position biases from the length of the cache."""
    torch.manual_seed(0)
    sizes = {**SIZES, **LOCAL} if family == "gpt_neo" else ALIBI[family]
    config = AutoConfig.for_model(family, **sizes)
    config.max_position_embeddings = 128  # without it a model is refused before it is loaded
    return spec_of(AutoModelForCausalLM.from_config(config).eval(), folder)


@pytest.mark.parametrize("precision", IN_MODULES)
@pytest.mark.parametrize("family", ["gpt_neo", *ALIBI])
def test_local_attention_and_alibi_are_found_in_every_precision(
    family: str, precision: str, tmp_path: Path
) -> None:
    spec = derives_its_own(family, tmp_path)
    if family == "falcon" and precision in ("nf4", "fp4"):
        with pytest.raises(LoaderError, match="all of its linear layers are FalconLinear"):
            loaders.load(precision, spec)
    else:
        assert "can't be batched here" in not_batched(precision, spec)


def test_alibi_that_depends_on_the_keys_positions_alone_is_served(
    tmp_path: Path, transformers_forward: list[float]
) -> None:
    """MPT's bias is linear in the key's position, and attention doesn't change by what all keys share."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("mpt", vocab_size=320, d_model=64, n_heads=4, n_layers=2, max_seq_len=128)
    config.max_position_embeddings, config.initializer_range = 128, 0.2
    runner = loaders.load("fp32", spec_of(AutoModelForCausalLM.from_config(config).eval(), tmp_path)).runner
    assert transformers_forward[-1] < 1e-4
    text = [5 + at for at in range(100)]
    runner.prefill(0, text[:64], "none")
    runner.prefill(1, text[:3], "none")
    for id_ in text[64:-1]:
        runner.decode([0, 1], [id_, id_])
    found = runner.decode([0, 1], [text[-1], 9])[0]
    assert torch.allclose(found, runner.score(text)[-1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4", "dynamic-int8"])
def test_local_attention_is_found_without_compiled_kernels(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loaders.kernels.get", lambda: None)
    assert "its rows disturb each other" in not_batched(precision, derives_its_own("gpt_neo", tmp_path))
    assert checked(precision, spec_of(with_outliers(deep_llama()), tmp_path / "llama")).slots == 2


@pytest.mark.parametrize("precision", IN_MODULES)
def test_the_model_computes_in_float32_and_is_as_before_afterwards(precision: str, tmp_path: Path) -> None:
    """The logits are those of a float32 model with the dequantized weights."""
    from loaders.layers.layer_weights import weights_of

    spec = spec_of(deep_llama(layers=2), tmp_path)
    model: Any = loaders.load(precision, spec).runner
    model = model.module
    expected = AutoModelForCausalLM.from_pretrained(spec.checkpoint.folder, dtype=torch.float32).eval()
    named = dict(model.named_modules())
    for name, module in expected.named_modules():
        held = weights_of(named[name])
        if isinstance(module, nn.Linear | nn.Embedding) and held is not None:
            module.weight = nn.Parameter(held.dequantize().clone())
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        with full_precision(model):
            found = model(input_ids=ids).logits
        after = model(input_ids=ids).logits
        reference = expected(input_ids=ids).logits
    assert found.dtype == torch.float32
    assert torch.allclose(found, reference, rtol=0, atol=1e-4 * float(reference.abs().max()))
    assert torch.equal(before, after)


def test_layers_beyond_two_of_a_kind_are_skipped_and_every_kind_computes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {**SIZES, **LOCAL, "num_layers": 6, "attention_types": [[["global"], 5], [["local"], 1]]}
    del sizes["num_hidden_layers"]  # GPT-Neo's is num_layers
    config = AutoConfig.for_model("gpt_neo", **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    spec = ModelSpec(open_checkpoint(str(checkpoints.save(model, tmp_path / "tiny"))), slots=2)
    assert "its rows disturb each other" in not_batched("fp32", spec)  # the only local layer is the last


def test_logits_that_are_no_numbers_are_found_in_the_arithmetic_that_serves(tmp_path: Path) -> None:
    model = deep_llama(layers=2)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight *= 100
        model.model.layers[0].self_attn.v_proj.weight *= 1e4
    spec = spec_of(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"not numbers \(beyond the range of float16"):
        checked("fp16", spec)
    assert checked("bf16", spec).score([5]).isfinite().all()
