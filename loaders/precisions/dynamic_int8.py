"""PyTorch's dynamic int8 for CPU hosts: every linear layer and, by choice, the head; weights per channel.

PyTorch takes one activation range over the whole batch: a row with an outlier degrades its batch-mates. Here
each row is scaled to its own largest magnitude first, and the kernel runs with one constant range: a row's
result is the same, bit for bit, alone and in any batch.
"""

import gc
import warnings
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loaders import kernels
from loaders.base import Availability, LoadedModel, ModelSpec, Progress
from loaders.checkpoint import load_pretrained, meta_model
from loaders.footprint import count_parameters, linear_weights, measure, reasons
from loaders.layers.conv1d import to_linear
from loaders.layers.huge_pages import Arena
from loaders.layers.native_linear import NativeLinear
from loaders.runners.select import runner_for

_WEIGHT_LEVELS = 127


def activation_levels() -> int:
    """Largest quantized magnitude of an activation.

    Without VNNI, FBGEMM adds pairs of uint8 × int8 products in 16 bits, which saturate with 8-bit
    activations; 7 bits never do (127 × 127 × 2 < 2¹⁵).
    """
    return 127 if torch.cpu._is_vnni_supported() else 63


def quantize_weight(weight: Tensor) -> Tensor:
    """(outputs, inputs) float32 → torch's qint8 with one scale an output: its largest magnitude / 127."""
    scales = (weight.abs().amax(dim=1) / _WEIGHT_LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_channel(weight, scales.double(), zeros, 0, torch.qint8)


def int8_linear(weight: Tensor, bias: Tensor | None, arena: Arena) -> nn.Module:
    """The layer in int8: on the compiled kernels, with weights in ``arena``; or on FBGEMM without any."""
    if kernels.get() is None or not kernels.supports("int8", weight.shape[1]):
        return DynamicInt8Linear(weight, bias)
    quantized = quantize_weight(weight)
    scales = quantized.q_per_channel_scales().float()
    return NativeLinear("int8", quantized.int_repr(), bias, scales, arena=arena)


class DynamicInt8Linear(nn.Module):
    """y = x Wᵀ + b with W in int8 per output channel and each row of x in its own int8 range.

    Args:
        weight: (outputs, inputs), float32.
        bias: (outputs,) or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self._levels = activation_levels()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces torchao as its successor
            self._packed = torch.ops.quantized.linear_prepack(quantize_weight(weight), None)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        ranges = rows.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            rows / ranges, 1 / self._levels, self._levels + 1, self._packed
        )
        y = y * ranges if self.bias is None else torch.addcmul(self.bias, y, ranges)
        return y.view(*x.shape[:-1], self.out_features)

    def unpacked(self) -> Iterator[tuple[str, Tensor]]:
        """What the packed object holds: int8 weights, and per channel a float32 scale, an int32 zero point
        and an int32 column offset."""
        weight, _ = torch.ops.quantized.linear_unpack(self._packed)
        yield "weights", weight.int_repr()
        yield "scales", weight.q_per_channel_scales().float()
        yield "zero_points", weight.q_per_channel_zero_points().int()
        yield "offsets", weight.int_repr().sum(dim=1, dtype=torch.int32)


def availability(precision: str, device: Literal["cpu", "cuda"]) -> Availability:
    if device == "cuda":
        return Availability("PyTorch's dynamic int8 has kernels for CPUs only; int8 is its like on a card")
    if not {"x86", "fbgemm"} & set(torch.backends.quantized.supported_engines):
        return Availability("this build of PyTorch has no FBGEMM kernels")
    return Availability()


def estimate_bytes(precision: str, spec: ModelSpec) -> int:
    model = meta_model(spec)
    size: int = 4 * count_parameters(model) - 3 * linear_weights(model)
    head = model.get_output_embeddings()
    if spec.quantize_lm_head and head is not None:
        tied = head.weight is model.get_input_embeddings().weight
        size += head.weight.numel() * (1 if tied else -3)
    return size


def load(precision: str, spec: ModelSpec, progress: Progress) -> LoadedModel:
    model = load_pretrained(spec, progress, dtype=torch.float32, device_map="cpu")
    parameters = count_parameters(model)
    head = model.get_output_embeddings()
    targets = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and (module is not head or spec.quantize_lm_head)
    ]
    arena = Arena()
    for done, (name, module) in enumerate(targets, 1):
        linear = to_linear(module) if isinstance(module, Conv1D) else module
        model.set_submodule(name, int8_linear(linear.weight.detach(), linear.bias, arena))
        progress("quantizing", done, len(targets))
    del targets, head, module, linear
    if kernels.get() is not None:
        arena.take_in(model)
    gc.collect()
    footprint = measure(
        model,
        parameters,
        lambda module: isinstance(module, DynamicInt8Linear),
        lambda module: module.unpacked() if isinstance(module, DynamicInt8Linear) else iter(()),
        reasons(model, "the head was left in fp32 by choice"),
    )
    native = kernels.get() is not None
    details = {
        "activation_bits": 8 if native or activation_levels() == 127 else 7,
        "per_row_ranges": True,
        "kernels": kernels.describe(),
    }
    return LoadedModel(precision, runner_for(model, spec), footprint, details=details)
