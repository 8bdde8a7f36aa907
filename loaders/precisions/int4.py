"""int4: four-bit weights in groups of 16, calibrated by GPTQ, on the compiled kernels of a CPU.

The projections that lose most are int8, as in llama.cpp's Q4_K_M: the one back from the MLP, and the values
of attention where they have a matrix of their own. The head is int8, and a tied embedding is looked up in it.
Activations are quantized to int8 in groups of 16.
"""

from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loaders import kernels
from loaders.artifacts import Recipe, prepare
from loaders.artifacts.native_weights import load_native, save_native
from loaders.base import Availability, LoadedModel, ModelSpec, Progress
from loaders.calibration import calibration_samples
from loaders.footprint import count_parameters, measure, reasons
from loaders.kernels.matrix import ACTIVATION_GROUP, INT4_GROUP
from loaders.layers.conv1d import to_linear
from loaders.layers.dynamic_int8_linear import int8_linear, int8_linear_bytes
from loaders.layers.huge_pages import Arena
from loaders.layers.int4_codes import STEP, int4_bytes
from loaders.layers.int4_rounding import quantize
from loaders.layers.linear_layers import read_directly, shape_of, uneven_inputs
from loaders.layers.native_linear import NativeLinear, adopt
from loaders.layers.norm_folding import fold_into_weights
from loaders.layers.shared_embedding import is_tied, share_embedding, stays_beside
from loaders.precisions.blockwise import (
    blocks_of,
    quantize_blocks,
    sensitive_layers,
    targets,
    without_blocks,
)
from loaders.pretrained import load_pretrained, meta_model
from loaders.runners.select import is_compiled, runner_for

SAMPLES, LENGTH = 32, 512
_LEAST = 0.5  # of the weights of blocks that must be in linear layers


def availability(precision: str, device: Literal["cpu", "cuda"]) -> Availability:
    if device == "cuda":
        return Availability("int4 is computed by the compiled CPU kernels; nf4 is its like on a card")
    if kernels.get() is None:
        return Availability(f"int4 needs the compiled CPU kernels: {kernels.find()}")
    return Availability()


def refusal(precision: str, spec: ModelSpec) -> str | None:
    model = meta_model(spec)
    if (why := without_blocks(model) or read_directly(model)) is not None:
        return why
    _, blocks = blocks_of(model)
    linear = sum(layer.weight.numel() for _, layer in targets(model))
    matrices = sum(one.numel() for one in blocks.parameters() if one.dim() > 1)
    if linear <= _LEAST * matrices:
        return "most weights of its blocks are in no linear layers (a mixture of experts, for example)"
    if (why := uneven_inputs(targets(model), STEP)) is not None:
        return f"{why}; int8 and dynamic-int8 take any width"
    return None


def estimate_bytes(precision: str, spec: ModelSpec) -> int:
    model = meta_model(spec)
    size: int = 4 * count_parameters(model)
    sensitive = sensitive_layers(model)
    for name, layer in targets(model):
        outputs, inputs = shape_of(layer)
        own = int8_linear_bytes(outputs, inputs) if name in sensitive else int4_bytes(outputs, inputs)
        size += own - 4 * outputs * inputs
    head: Any = model.get_output_embeddings()
    if type(head) is nn.Linear:
        size += int8_linear_bytes(*head.weight.shape)
        size -= 0 if stays_beside(model, int8=True) else 4 * head.weight.numel()
    if is_compiled(spec.checkpoint.config):
        looked_up = [m.weight for m in model.modules() if type(m) is nn.Embedding]
        size -= sum(2 * weight.numel() for weight in looked_up if head is None or weight is not head.weight)
    return size


def recipe(precision: str, spec: ModelSpec) -> Recipe:
    options: dict[str, Any] = {"format": 1, "samples": SAMPLES, "length": min(LENGTH, spec.max_tokens)}
    return Recipe("int4", options, ("torch",), calibrated=True)


def make(precision: str, spec: ModelSpec, folder: Path, progress: Progress) -> None:
    """Writes the quantized model.

    Raises:
        CheckpointError: its blocks don't follow each other.
        CalibrationError
    """
    samples = calibration_samples(spec, SAMPLES, LENGTH)
    model = load_pretrained(spec, progress, dtype=torch.float32, device_map="cpu")
    quantize_model(model, samples, progress)
    save_native(model, folder)


def load(precision: str, spec: ModelSpec, progress: Progress) -> LoadedModel:
    folder = prepare(spec, recipe(precision, spec), partial(make, precision, spec), progress)
    model = load_native(spec, folder, progress)
    parameters = count_parameters(meta_model(spec))
    runner = runner_for(model, spec)
    footprint = measure(model, parameters, reasons(model, "the head is kept in float32"))
    details = {
        "group_size": INT4_GROUP,
        "activation_bits": 8,
        "activation_group_size": ACTIVATION_GROUP,
        "calibration": "GPTQ",
        "kernels": kernels.describe(),
    }
    return LoadedModel(precision, runner, footprint, details=details)


def quantize_model(model: PreTrainedModel, samples: Tensor, progress: Progress) -> None:
    """Replaces the linear layers of a float32 model by quantized ones on the kernels."""
    arena, sensitive = Arena(), sensitive_layers(model)
    factors = fold_into_weights(model, head=False)
    _quantize_head(model, arena)

    def replace(name: str, layer: nn.Linear | Conv1D, hessian: Tensor | None) -> None:
        linear = to_linear(layer)
        if name in sensitive:
            quantized = int8_linear(linear.weight.detach(), linear.bias, arena)
        else:
            codes, state = quantize(linear.weight.detach(), hessian)
            quantized = NativeLinear("int4", codes, linear.bias, four_bit=state, arena=arena)
        quantized.input_scale = factors.get(name)
        model.set_submodule(name, quantized)

    quantize_blocks(model, samples, replace, progress)
    if is_compiled(model.config):  # what is looked up; the compiled forward pass reads it in any type
        for module in model.modules():
            if type(module) is nn.Embedding:
                module.weight.data = module.weight.data.bfloat16()
    adopt(model, progress, arena)


def _quantize_head(model: PreTrainedModel, arena: Arena) -> None:
    head: Any = model.get_output_embeddings()
    if type(head) is not nn.Linear or not kernels.supports("int8", head.in_features):
        return
    tied = is_tied(model)
    name = next(name for name, module in model.named_modules() if module is head)
    model.set_submodule(name, int8_linear(head.weight.detach(), head.bias, arena))
    if tied:
        share_embedding(model)
