"""Dynamic int8 for CPUs: every linear layer and, optionally, the head.

PyTorch's own takes one activation range over the whole batch: a row with an outlier degrades the other rows.
The compiled kernels scale groups of 16 activations and of a row's weights each by its largest magnitude, so
that an outlier costs precision in its group alone. Without them, FBGEMM runs with a constant range on rows
scaled by their own, and weights have a scale per output. Either way a row's result is bit-identical alone and
in any batch.
"""

import gc
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loaders import kernels
from loaders.artifacts import Recipe, prepare
from loaders.artifacts.native_weights import load_native, save_native
from loaders.base import Availability, LoadedModel, ModelSpec, Progress
from loaders.footprint import count_parameters, measure, reasons
from loaders.kernels.matrix import ACTIVATION_GROUP, INT8_LANES
from loaders.layers.conv1d import to_linear
from loaders.layers.dynamic_int8_linear import int8_linear, int8_linear_bytes, weight_levels
from loaders.layers.huge_pages import Arena
from loaders.layers.linear_layers import read_directly
from loaders.layers.norm_folding import fold_norms
from loaders.layers.shared_embedding import is_tied, share_embedding, stays_beside
from loaders.pretrained import load_pretrained, meta_model
from loaders.runners.select import runner_for


def availability(precision: str, device: Literal["cpu", "cuda"]) -> Availability:
    if device == "cuda":
        return Availability("PyTorch's dynamic int8 has kernels for CPUs only; int8 is its like on a card")
    if not {"x86", "fbgemm"} & set(torch.backends.quantized.supported_engines):
        return Availability("this build of PyTorch has no FBGEMM kernels")
    return Availability()


def refusal(precision: str, spec: ModelSpec) -> str | None:
    return read_directly(meta_model(spec))


def estimate_bytes(precision: str, spec: ModelSpec) -> int:
    model = meta_model(spec)
    head = model.get_output_embeddings()
    size: int = 4 * count_parameters(model)
    for layer in model.modules():
        if not isinstance(layer, nn.Linear | Conv1D) or (layer is head and not spec.quantize_lm_head):
            continue
        outputs, inputs = reversed(layer.weight.shape) if isinstance(layer, Conv1D) else layer.weight.shape
        kept = layer is head and stays_beside(model, kernels.supports("int8", inputs))
        size += int8_linear_bytes(outputs, inputs) - (0 if kept else 4 * outputs * inputs)
    return size


PREPARED = False  # quantizing takes no longer than reading what was saved


def recipe(precision: str, spec: ModelSpec) -> Recipe:
    return Recipe(precision, {"format": 1, "quantize_lm_head": spec.quantize_lm_head})


def make(precision: str, spec: ModelSpec, folder: Path, progress: Progress) -> None:
    save_native(_quantized(spec, progress), folder)


def load(precision: str, spec: ModelSpec, progress: Progress) -> LoadedModel:
    if spec.checkpoint.saved is not None:
        folder = prepare(spec, recipe(precision, spec), None, progress)
        model = load_native(spec, folder, progress)
    else:
        model = _quantized(spec, progress)
    parameters = count_parameters(meta_model(spec))
    footprint = measure(model, parameters, reasons(model, "the head was left in fp32 by choice"))
    native = kernels.get() is not None
    details = {
        "activation_bits": 8,
        "weight_bits": 8 if native or weight_levels() == 127 else 7,
        "per_row_ranges": True,
        "activation_group_size": ACTIVATION_GROUP if native else "row",
        "weight_scales_per_output": INT8_LANES if native else 1,
        "kernels": kernels.describe(),
    }
    return LoadedModel(precision, runner_for(model, spec), footprint, details=details)


def _quantized(spec: ModelSpec, progress: Progress) -> PreTrainedModel:
    model = load_pretrained(spec, progress, dtype=torch.float32, device_map="cpu")
    head = model.get_output_embeddings()
    targets = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and (module is not head or spec.quantize_lm_head)
    ]
    folded = fold_norms(model, head=spec.quantize_lm_head)
    arena, tied = Arena(), is_tied(model)
    for done, (name, module) in enumerate(targets, 1):
        linear = to_linear(module)
        model.set_submodule(name, int8_linear(linear.weight.detach(), linear.bias, arena, folded.get(name)))
        progress("quantizing", done, len(targets))
    if tied:
        share_embedding(model)
    del targets, head, module, linear
    if kernels.get() is not None:
        arena.move_remaining(model)
    gc.collect()
    return model
