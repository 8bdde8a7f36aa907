"""Static int8 for CPUs: weights, and activations by constant scales that calibration found.

As post-training static quantization in PyTorch's textbook form: observers see the inputs of every linear
layer while the model runs over calibration samples, ranges are chosen, and the layers are converted. A step
then packs a row without a search for its range. Layers that lose too much by constant scales keep dynamic
ones: a few tokens have activations hundreds of times larger than all others in some layers of real models.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loaders import kernels
from loaders.artifacts import Recipe, prepare
from loaders.artifacts.native_weights import load_native, save_native
from loaders.base import Availability, LoadedModel, ModelSpec, Progress
from loaders.calibration import calibration_samples
from loaders.errors import CheckpointError
from loaders.footprint import count_parameters, measure, reasons
from loaders.layers.conv1d import to_linear
from loaders.layers.dynamic_int8_linear import int8_linear
from loaders.layers.huge_pages import Arena
from loaders.layers.linear_layers import inner_layers, read_directly, shape_of
from loaders.layers.native_linear import NativeLinear, adopt
from loaders.layers.norm_folding import fold_norms
from loaders.layers.observed_inputs import ObservedInputs, observe
from loaders.layers.shared_embedding import is_tied, share_embedding
from loaders.layers.static_int8 import OBSERVERS, StaticWeights, calibrate
from loaders.manifest import read_manifest
from loaders.precisions.head import head_type, head_weight, own_head_bytes, replace_head
from loaders.pretrained import load_pretrained, meta_model
from loaders.runners.select import runner_for
from loaders.texts.calibration import CalibrationError

LONG, LONG_TOKENS = 8, 2048
"""Samples of the whole context, and its largest length: where positions are learned, the activations of those
that no sample reaches would be clipped."""
SHORT, SHORT_TOKENS = 64, 64
"""Samples that begin at many places: a text's first tokens have the largest activations."""
LEAST_SQNR_DB = 30.0
"""Of a layer's outputs on the calibration text; a layer below it stays dynamic if that is better."""
_FORMAT = 1


def availability(precision: str, device: Literal["cpu", "cuda"]) -> Availability:
    if device == "cuda":
        return Availability("static int8 has kernels for CPUs only; int8 is its like on a card")
    if kernels.get() is None:
        return Availability(f"static int8 runs on the compiled kernels alone: {kernels.find()}")
    return Availability()


def refusal(precision: str, spec: ModelSpec) -> str | None:
    model = meta_model(spec)
    if _targets(model):
        return read_directly(model)
    return "it has no linear layer of a width that the compiled kernels take in int8"


def recipe(precision: str, spec: ModelSpec) -> Recipe:
    options: dict[str, Any] = {
        "samples": f"{LONG} × {min(LONG_TOKENS, spec.max_tokens)} + {SHORT} × {SHORT_TOKENS} tokens",
        "observers": " ".join(OBSERVERS),
        "least_sqnr_db": LEAST_SQNR_DB,
        "head": str(_head_type(spec, meta_model(spec))),
        "format": _FORMAT,
    }
    return Recipe(precision, options, packages=("torch", "transformers"), calibrated=True)


def estimate_bytes(precision: str, spec: ModelSpec) -> int:
    model = meta_model(spec)
    size: int = 4 * count_parameters(model)
    for outputs, inputs in _targets(model).values():
        size += outputs * (inputs + 8) + 8 * inputs - 4 * outputs * inputs
    if (of_head := _head_type(spec, model)) != torch.float32:
        size += own_head_bytes(model, torch.float32, of_head)
    return size


def load(precision: str, spec: ModelSpec, progress: Progress) -> LoadedModel:
    folder = prepare(spec, recipe(precision, spec), partial(make, precision, spec), progress)
    model = load_native(spec, folder, progress)
    of_head = model.get_output_embeddings().weight.dtype
    kept = "the head is kept in " + str(of_head).removeprefix("torch.")
    others = "the compiled kernels don't take its number of inputs"
    footprint = measure(model, count_parameters(meta_model(spec)), reasons(model, kept, others))
    facts = read_manifest(folder).recipe
    details = {
        "calibration": {
            "text": facts["calibration"]["name"],
            "sha256": facts["calibration"]["sha256"],
            "samples": facts["options"]["samples"],
        },
        **_calibrated(model),
        "head": str(of_head),
        "weight_scales_per_output": 1,
        "kernels": kernels.describe(),
    }
    return LoadedModel(precision, runner_for(model, spec), footprint, details=details)


def make(precision: str, spec: ModelSpec, folder: Path, progress: Progress) -> None:
    """Calibrates and quantizes the checkpoint, and writes it into ``folder``.

    Raises:
        CalibrationError, CheckpointError, OutOfMemory
    """
    samples = [
        *calibration_samples(spec, LONG, LONG_TOKENS),
        *calibration_samples(spec, SHORT, SHORT_TOKENS),
    ]
    if len(samples) < 4:
        raise CalibrationError("the calibration text is too short for four samples")
    model = load_pretrained(spec, progress, dtype=torch.float32, device_map="cpu")
    convert(model, spec, samples, progress)
    save_native(model, folder)


def convert(
    model: PreTrainedModel,
    spec: ModelSpec,
    samples: Sequence[Tensor],
    progress: Progress,
    observers: Sequence[str] = OBSERVERS,
    least_sqnr_db: float = LEAST_SQNR_DB,
) -> None:
    """Replaces the linear layers of a float32 model by static int8 ones.

    Args:
        samples: token ids, of any length each; at least four.
        observers: of ``calibrate``.

    Raises:
        CheckpointError: an activation is not finite.
    """
    targets = _targets(model)
    of_head, arena = _head_type(spec, model), Arena()
    folded = _fold(model, targets, of_head)
    layers = {name: model.get_submodule(name) for name in targets}
    for seen in _observe(model, spec, layers, samples, progress):
        weights = [layers[name].weight.detach() for name in seen.names]
        found = calibrate(seen, weights, observers)
        static = found.sqnr_db >= min(least_sqnr_db, found.dynamic_sqnr_db)
        factors = arena.place(found.weights[0].input_factors)
        for name, quantized, calibration in zip(seen.names, found.weights, found.calibrations, strict=True):
            old = layers.pop(name)
            new = _static(quantized, factors, old, arena) if static else _dynamic(old, arena)
            new.calibration, new.input_scale = calibration, folded.get(name)
            model.set_submodule(name, new)
        progress("quantizing", len(targets) - len(layers), len(targets))
    for name, old in layers.items():  # too few samples reached them
        new = _dynamic(old, arena)
        new.input_scale = folded.get(name)
        model.set_submodule(name, new)
    _convert_head(model, of_head, folded, arena)
    adopt(model, progress, arena)


def _targets(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of every linear layer but the head that the kernels compute in int8."""
    shapes = {name: shape_of(layer) for name, layer in inner_layers(model)}
    return {name: shape for name, shape in shapes.items() if kernels.supports("static-int8", shape[1])}


def _head_type(spec: ModelSpec, model: PreTrainedModel) -> torch.dtype:
    return head_type("static-int8", spec, model, torch.float32)


def _fold(model: PreTrainedModel, targets: Iterable[str], of_head: torch.dtype) -> dict[str, Tensor]:
    """Folds norms, and makes every target an nn.Linear that includes its factors; returns all factors."""
    folded = fold_norms(model, head=of_head == torch.int8)
    for name in targets:
        linear = to_linear(model.get_submodule(name))
        if name in folded:
            linear.weight = nn.Parameter(linear.weight.detach() * folded[name], requires_grad=False)
        model.set_submodule(name, linear)
    return folded


def _observe(
    model: PreTrainedModel,
    spec: ModelSpec,
    layers: Mapping[str, Any],
    samples: Sequence[Tensor],
    progress: Progress,
) -> list[ObservedInputs]:
    def run(ids: Tensor) -> None:
        model.base_model(input_ids=ids, use_cache=False)

    try:
        return observe(run, layers, samples, lambda done: progress("calibrating", done, len(samples)))
    except ValueError as error:
        raise CheckpointError(
            f"{spec.checkpoint.model_id} has activations on the calibration text that are not finite"
        ) from error


def _static(found: StaticWeights, factors: Tensor, old: Any, arena: Arena) -> NativeLinear:
    return NativeLinear(
        "static-int8", found.codes, old.bias, found.scales, arena=arena, input_factors=factors
    )


def _dynamic(old: Any, arena: Arena) -> NativeLinear:
    linear = int8_linear(old.weight.detach(), old.bias, arena)
    assert isinstance(linear, NativeLinear)  # a target's inputs fit the kernels
    return linear


def _convert_head(
    model: PreTrainedModel, dtype: torch.dtype, folded: Mapping[str, Tensor], arena: Arena
) -> None:
    head = model.get_output_embeddings()
    if dtype == torch.float32:
        return
    if dtype != torch.int8:
        replace_head(model, head_weight(model), dtype, arena)
        return
    tied = is_tied(model)
    name = next(name for name, module in model.named_modules() if module is head)
    model.set_submodule(name, int8_linear(head.weight.detach(), head.bias, arena, folded.get(name)))
    if tied:
        share_embedding(model)


def _calibrated(model: PreTrainedModel) -> dict[str, Any]:
    """For ``/stats``: how many layers each observer has, and the layers that stay dynamic.

    Those are by name with the SQNR of their outputs in dB, with constant scales and with dynamic ones.
    """
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, NativeLinear)]
    observers = Counter(
        m.calibration.observer for _, m in linears if m.kind == "static-int8" and m.calibration
    )
    dynamic = {
        name: None if m.calibration is None else (m.calibration.sqnr_db, m.calibration.dynamic_sqnr_db)
        for name, m in linears
        if m.kind == "int8" and m is not model.get_output_embeddings()
    }
    return {"observers": dict(observers.most_common()), "dynamic_layers": dynamic}
