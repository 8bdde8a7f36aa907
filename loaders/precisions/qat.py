"""qat-int8 and qat-int4: quantization-aware training, then the compiled kernels.

The linear layers are trained with the rounding of their quantized form (``loaders.layers.fake_quantize``)
to give the original model's distributions on the calibration text. Embeddings, norms and biases stay as they
are, so that what the text doesn't show isn't lost.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loaders import kernels
from loaders.artifacts import Recipe, prepare
from loaders.artifacts.native_weights import load_native, save_native
from loaders.artifacts.prepare import place_of
from loaders.base import Availability, LoadedModel, ModelSpec, Progress
from loaders.calibration import calibration_samples
from loaders.footprint import count_parameters, measure, reasons
from loaders.layers.conv1d import to_linear
from loaders.layers.dynamic_int8_linear import int8_linear_bytes
from loaders.layers.fake_quantize import (
    FOUR_BIT_BLOCK,
    FakeFourBitLinear,
    FakeInt8Linear,
    FakeQuantizedLinear,
)
from loaders.layers.huge_pages import Arena
from loaders.layers.int8_grids import CHANNELS, GROUPS
from loaders.layers.linear_layers import none_to_quantize, outside_layers, shape_of, uneven_inputs
from loaders.layers.norm_folding import fold_norms
from loaders.layers.shared_embedding import is_tied, share_embedding, stays_beside
from loaders.manifest import read_manifest
from loaders.pretrained import load_pretrained, meta_model
from loaders.runners.select import runner_for
from loaders.training import Plan, TrainingError, distil

_RATE = 0.008  # highest step of a weight, in distances of neighbouring quantized values
_SCALE_RATE = 1e-3  # highest step of a scale's logarithm
_ROWS, _LENGTH = 4, 128  # texts of a step, and their tokens
_TEXTS = 2**16  # at most
_SEED = 20261128
_FORMAT = 1  # raised when the same options begin to give other files


def availability(precision: str, device: Literal["cpu", "cuda"]) -> Availability:
    if device == "cuda":
        return Availability("it is trained for the compiled kernels, which are for CPUs")
    if kernels.get() is None:
        return Availability(f"it needs the compiled kernels: {kernels.find()}")
    return Availability()


def refusal(precision: str, spec: ModelSpec) -> str | None:
    model = meta_model(spec)
    if (why := outside_layers(model) or none_to_quantize(model)) is not None:
        return why
    if (why := uneven_inputs(_targets(model, spec), FOUR_BIT_BLOCK)) is not None:
        return f"{why}, which the kernels take at once; int8 takes any width"
    return None


def estimate_bytes(precision: str, spec: ModelSpec) -> int:
    model = meta_model(spec)
    head = model.get_output_embeddings()
    size: int = 4 * count_parameters(model)
    for _, layer in _targets(model, spec):
        outputs, inputs = shape_of(layer)
        kept = layer is head and stays_beside(model, kernels.supports("int8", inputs))
        four_bit = precision == "qat-int4" and layer is not head
        own = outputs * inputs // 2 + outputs * inputs // FOUR_BIT_BLOCK * 4
        size += own if four_bit else int8_linear_bytes(outputs, inputs)
        size -= 0 if kept else 4 * outputs * inputs
    return size


def recipe(precision: str, spec: ModelSpec) -> Recipe:
    options: dict[str, Any] = {
        "format": _FORMAT,
        "steps": spec.training_steps,
        "rate": _RATE,
        "scale_rate": _SCALE_RATE,
        "rows": _ROWS,
        "length": min(_LENGTH, spec.max_tokens),
        "seed": _SEED,
        "block": FOUR_BIT_BLOCK if precision == "qat-int4" else None,
        "head": "int8" if spec.quantize_lm_head else "float32",
    }
    if precision == "qat-int8" and spec.granularity == "channel":
        options["granularity"] = spec.granularity
    return Recipe(precision, options, packages=("torch", "transformers"), calibrated=True)


def make(precision: str, spec: ModelSpec, folder: Path, progress: Progress) -> None:
    """Trains and quantizes the model, and writes it for ``load``.

    The state of the training is kept beside the cached files of the same recipe, wherever ``folder`` is.

    Raises:
        TrainingError: no steps, or too little text.
        CalibrationError
    """
    if spec.training_steps < 1:
        raise TrainingError(f"{precision} needs at least one training step, not {spec.training_steps}")
    texts = calibration_samples(spec, _TEXTS, _LENGTH)
    if len(texts) < _ROWS:
        raise TrainingError(
            f"the calibration text has {texts.numel()} tokens, too few to train on: "
            f"{_ROWS * texts.shape[1]} are the fewest"
        )
    student, teacher = (
        load_pretrained(spec, progress, dtype=torch.float32, device_map="cpu").requires_grad_(False)
        for _ in range(2)
    )
    tied = spec.quantize_lm_head and is_tied(student)
    insert(precision, student, spec)
    place = place_of(spec, recipe(precision, spec))
    state = place.with_name(f"{place.name}.training")
    distil(student, teacher, trained(student), texts, plan(precision, spec), state, progress)
    del teacher
    convert(student)
    if tied:
        share_embedding(student)
    save_native(student, folder)


def plan(precision: str, spec: ModelSpec) -> Plan:
    # what four-bit weights are multiplied with is in bfloat16 on the kernels as well
    bfloat16 = precision == "qat-int4" and torch.cpu._is_avx512_bf16_supported()
    return Plan(spec.training_steps, _ROWS, _SEED, bfloat16)


def trained(model: PreTrainedModel) -> list[tuple[Tensor, float]]:
    """The trained parameters, each with its highest learning rate."""
    found: list[tuple[Tensor, float]] = []
    for module in model.modules():
        if isinstance(module, FakeQuantizedLinear) and module.weight.requires_grad:
            found.append((module.weight, _RATE * module.resolution()))
            if isinstance(module, FakeFourBitLinear):
                found.append((module.log_ratio, _SCALE_RATE))
    return found


def insert(precision: str, model: PreTrainedModel, spec: ModelSpec) -> None:
    """Replaces the model's linear layers by trained ones that compute as their quantized form will."""
    head = model.get_output_embeddings()
    targets = list(_targets(model, spec))
    channels = precision == "qat-int8" and spec.granularity == "channel"
    folds_head = spec.quantize_lm_head and not (channels and is_tied(model))  # LiteRT has one matrix for both
    folded = fold_norms(model, folds_head) if precision == "qat-int8" else {}
    for name, module in targets:
        linear = to_linear(module)
        layer: FakeQuantizedLinear
        if precision == "qat-int8" or module is head:
            layer = FakeInt8Linear(
                linear.weight, linear.bias, folded.get(name), CHANNELS if channels else GROUPS
            )
        else:
            layer = FakeFourBitLinear(linear.weight, linear.bias)
        layer.weight.requires_grad_(module is not head)
        model.set_submodule(name, layer)


def convert(model: PreTrainedModel) -> None:
    """Replaces the trained layers by their quantized form on the kernels."""
    arena = Arena()
    for name, module in list(model.named_modules()):
        if isinstance(module, FakeQuantizedLinear):
            model.set_submodule(name, module.to_native(arena))


def load(precision: str, spec: ModelSpec, progress: Progress) -> LoadedModel:
    """
    Raises:
        NotPrepared: the model was not trained yet.
    """
    folder = prepare(spec, recipe(precision, spec), None, progress)
    model = load_native(spec, folder, progress)
    footprint = measure(
        model, count_parameters(meta_model(spec)), reasons(model, "the head was left in fp32 by choice")
    )
    options = read_manifest(folder).recipe["options"]  # may be others than the spec's
    details: dict[str, Any] = {"training_steps": options["steps"], "kernels": kernels.describe()}
    if precision == "qat-int4":
        details["block_size"] = FOUR_BIT_BLOCK
    else:
        details["granularity"] = granularity_of(options)
    return LoadedModel(precision, runner_for(model, spec), footprint, details=details)


def granularity_of(options: Mapping[str, Any]) -> str:
    """What shared a scale in a training with these options of a recipe."""
    found: str = options.get("granularity", "group")
    return found


def _targets(model: PreTrainedModel, spec: ModelSpec) -> Iterator[tuple[str, nn.Linear | Conv1D]]:
    """The layers that are quantized, by name."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and (module is not head or spec.quantize_lm_head):
            yield name, module
