"""A linear layer on the compiled CPU kernels, for every storage format.

``adopt`` replaces the linear layers of any model. Weights keep their format, so the bytes counted are the
bytes read; those of GPT-2's Conv1D are transposed, and all are moved to huge pages.
"""

from collections.abc import Mapping
from dataclasses import asdict
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loaders import kernels
from loaders.base import Progress
from loaders.kernels import FourBit
from loaders.layers.conv1d import to_linear
from loaders.layers.dequantize import dequantize_four_bit, dequantize_int8
from loaders.layers.huge_pages import Arena
from loaders.layers.int4_codes import dequantize_int4
from loaders.layers.layer_weights import InputCalibration, LayerWeights, dense

FORMATS: dict[torch.dtype, kernels.Format] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}

_FOUR_BIT_TENSORS = ("table", "scales", "nested_table", "nested_scales")


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class NativeLinear(nn.Module):
    """y = x Wᵀ + b in float32; a row's result is bit-identical alone and in any batch.

    Args:
        kind: format of ``weight``, as in ``kernels.PackedMatrix``.
        weight: (outputs, inputs), or (outputs, inputs / 2) bytes of codes in ``four-bit`` and ``int4``.
        bias: (outputs,) of any float type, or None.
        scales: for int8, as in ``kernels.PackedMatrix``.
        four_bit: table and scales of four-bit codes.
        arena: the memory that all tensors are moved to; None leaves them in place.
        input_factors: for static-int8, as in ``kernels.PackedMatrix``; never moved, since layers share them.
    """

    def __init__(
        self,
        kind: kernels.Format,
        weight: Tensor,
        bias: Tensor | None,
        scales: Tensor | None = None,
        four_bit: FourBit | None = None,
        arena: Arena | None = None,
        input_factors: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.four_bit = kind, four_bit
        self.calibration: InputCalibration | None = None
        self.input_scale: Tensor | None = None  # factors that ``weight`` includes, as in LayerWeights
        # a parameter is kept as the same object: a tied head stays tied and is counted once
        self.weight = weight if isinstance(weight, nn.Parameter) else _frozen(weight)
        self.bias = None if bias is None else _frozen(bias.detach())
        self.scales = None if scales is None else _frozen(scales)
        self.input_factors = None if input_factors is None else _frozen(input_factors)
        if arena is not None:
            self._move(arena)
        library = kernels.get()
        assert library is not None, str(kernels.find())
        held, scales = (None if t is None else t.detach() for t in (self.bias, self.scales))
        self.matrix = kernels.PackedMatrix(
            library, kind, self.weight.detach(), scales, held, four_bit, input_factors
        )
        self.in_features, self.out_features = self.matrix.inputs, self.matrix.outputs

    def _move(self, arena: Arena) -> None:
        for parameter in (self.weight, self.bias, self.scales):
            if parameter is not None:
                parameter.data = arena.place(parameter.data)
        if self.four_bit is not None:
            self.four_bit.scales = arena.place(self.four_bit.scales)
            if self.kind == "int4" and self.four_bit.nested_scales is not None:
                self.four_bit.nested_scales = arena.place(self.four_bit.nested_scales)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).float().contiguous()
        return self.matrix(rows).view(*x.shape[:-1], self.out_features).to(x.dtype)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that ``from_state`` makes the same layer of: tensors, and facts as a JSON object."""
        facts: dict[str, Any] = {"kind": self.kind}
        tensors = {
            "weight": self.weight,
            "bias": self.bias,
            "scales": self.scales,
            "input_scale": self.input_scale,
            "input_factors": self.input_factors,
        }
        if self.calibration is not None:
            facts["calibration"] = asdict(self.calibration)
        if (four_bit := self.four_bit) is not None:
            facts |= {"block": four_bit.block, "nested_offset": four_bit.nested_offset}
            tensors |= {f"four_bit.{name}": getattr(four_bit, name) for name in _FOUR_BIT_TENSORS}
        return {name: one.detach() for name, one in tensors.items() if one is not None}, facts

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> "NativeLinear":
        """The layer of a ``state``, which refers to these tensors.

        Raises:
            KeyError, ValueError: it is not the state of a layer.
        """
        four_bit = None
        if "block" in facts:
            parts = {name: tensors.get(f"four_bit.{name}") for name in _FOUR_BIT_TENSORS}
            four_bit = FourBit(block=facts["block"], nested_offset=facts["nested_offset"], **parts)  # type: ignore[arg-type]
        bias, scales, factors = (tensors.get(name) for name in ("bias", "scales", "input_factors"))
        layer = cls(facts["kind"], tensors["weight"], bias, scales, four_bit, input_factors=factors)
        layer.input_scale = tensors.get("input_scale")
        if "calibration" in facts:
            layer.calibration = InputCalibration(**facts["calibration"])
        return layer

    def layer_weights(self) -> LayerWeights:
        weight, shape = self.weight.detach(), (self.out_features, self.in_features)
        if (four_bit := self.four_bit) is not None:
            state = _four_bit_state(self.kind, four_bit)
            dequantize = dequantize_int4 if self.kind == "int4" else dequantize_four_bit
            return LayerWeights(
                "4-bit",
                shape,
                weight,
                lambda: dequantize(weight, four_bit),
                state,
                input_scale=self.input_scale,
            )
        if self.scales is not None:
            scales = self.scales.detach()
            factors = None if self.input_factors is None else self.input_factors.detach()
            return LayerWeights(
                "int8",
                shape,
                weight,
                lambda: dequantize_int8(weight, scales, factors),
                _int8_state(scales, factors, self.matrix.offsets),
                input_scale=self.input_scale,
                input_factors=factors,
                calibration=self.calibration,
            )
        return dense(weight)


def _int8_state(scales: Tensor, factors: Tensor | None, offsets: Tensor | None) -> list[tuple[str, Tensor]]:
    roles = (("scales", scales), ("input_factors", factors), ("offsets", offsets))
    return [(role, tensor) for role, tensor in roles if tensor is not None]


def _four_bit_state(kind: kernels.Format, described: FourBit) -> list[tuple[str, Tensor]]:
    if kind == "int4" and described.nested_scales is not None:
        return [
            ("scales", described.scales),
            ("scales", described.nested_scales),
            ("tables", described.table),
        ]
    state = [("absmax", described.scales), ("tables", described.table)]
    if described.nested_table is not None and described.nested_scales is not None:
        state += [("absmax", described.nested_scales), ("tables", described.nested_table)]
    return state


@singledispatch
def to_native(module: nn.Module, arena: Arena) -> NativeLinear | None:
    """The layer on the compiled kernels; None if they can't compute it.

    Other modules register further classes, as with ``weights_of``.
    """
    return None


@to_native.register(nn.Linear)
def _(module: Any, arena: Arena) -> NativeLinear | None:
    if type(module) is not nn.Linear:  # a subclass may compute otherwise
        return None
    kind = FORMATS.get(module.weight.dtype)
    if kind is None or not kernels.supports(kind, module.in_features):
        return None
    return NativeLinear(kind, module.weight, module.bias, arena=arena)


@to_native.register(Conv1D)
def _(module: Any, arena: Arena) -> NativeLinear | None:
    return to_native(to_linear(module), arena)


def adopt(model: nn.Module, progress: Progress, arena: Arena | None = None) -> bool:
    """Replaces every linear layer that the compiled kernels can compute; returns False without any kernels.

    bitsandbytes' layers are replaced before their first forward pass, which may rearrange their weights.

    Args:
        arena: the memory of layers that are on the kernels already; the others are moved there.
    """
    if kernels.get() is None:
        return False
    # bitsandbytes' layers are nn.Linear, too
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    arena = arena or Arena()
    for done, (name, module) in enumerate(layers, 1):
        if (replacement := to_native(module, arena)) is not None:
            model.set_submodule(name, replacement)
        progress("packing", done, len(layers))
    arena.move_remaining(model)
    return True
