"""A linear layer on the compiled CPU kernels, for every format in which weights are kept.

``adopt`` puts it in place of a model's own linear layers, whatever the architecture. Weights keep their
format, so the bytes counted are the bytes read; GPT-2's Conv1D is transposed, and all move to large pages.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loaders import kernels
from loaders.base import Progress
from loaders.layers.conv1d import to_linear
from loaders.layers.huge_pages import Arena

FORMATS: dict[torch.dtype, kernels.Format] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class NativeLinear(nn.Module):
    """y = x Wᵀ + b in float32, each row by itself: the same, bit for bit, alone and in any batch.

    Args:
        kind: format of ``weight``, as ``kernels.PackedMatrix`` has it.
        weight: (outputs, inputs), or (outputs, inputs / 2) bytes of four-bit codes.
        bias: (outputs,) of any float type, or None.
        scales: (outputs,) float32 of int8.
        four_bit: what the codes stand for.
        arena: where all of these are moved to; they stay where they are without one.
    """

    def __init__(
        self,
        kind: kernels.Format,
        weight: Tensor,
        bias: Tensor | None,
        scales: Tensor | None = None,
        four_bit: kernels.FourBit | None = None,
        arena: Arena | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.four_bit = kind, four_bit
        # the very parameter, where it is one: a tied head stays tied, and is counted once
        self.weight = weight if isinstance(weight, nn.Parameter) else _frozen(weight)
        self.bias = None if bias is None else _frozen(bias.detach())
        self.scales = None if scales is None else _frozen(scales)
        if arena is not None:
            self._move(arena)
        library = kernels.get()
        assert library is not None, str(kernels.find())
        held, scales = (None if t is None else t.detach() for t in (self.bias, self.scales))
        self.matrix = kernels.PackedMatrix(library, kind, self.weight.detach(), scales, held, four_bit)
        self.in_features, self.out_features = self.matrix.inputs, self.matrix.outputs

    def _move(self, arena: Arena) -> None:
        for parameter in (self.weight, self.bias, self.scales):
            if parameter is not None:
                parameter.data = arena.place(parameter.data)
        if self.four_bit is not None:
            self.four_bit.scales = arena.place(self.four_bit.scales)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).float().contiguous()
        return self.matrix(rows).view(*x.shape[:-1], self.out_features).to(x.dtype)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that describe the quantization, by role, as ``footprint.measure`` wants them."""
        if self.scales is not None:
            yield "scales", self.scales
        if (state := self.four_bit) is not None:
            yield "absmax", state.scales
            yield "tables", state.table
            if state.nested_table is not None and state.nested_scales is not None:
                yield "absmax", state.nested_scales
                yield "tables", state.nested_table

    @property
    def is_quantized(self) -> bool:
        return self.kind in ("int8", "four-bit")


def adopt(model: nn.Module, progress: Progress) -> bool:
    """Replaces every linear layer that the compiled kernels can compute; whether there are any kernels.

    bitsandbytes layers are taken as loaded, before their first forward pass (which may rearrange them).
    """
    if kernels.get() is None:
        return False
    layers = [(name, module) for name, module in model.named_modules() if _is_linear(module)]
    arena = Arena()
    for done, (name, module) in enumerate(layers, 1):
        if (native := _native(module, arena)) is not None:
            model.set_submodule(name, native)
        progress("packing", done, len(layers))
    arena.move_remaining(model)
    return True


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)  # bitsandbytes' layers are nn.Linear, too


def _native(module: Any, arena: Arena) -> NativeLinear | None:
    kind = type(module).__name__
    if kind == "Linear8bitLt":
        return _from_int8(module, arena)
    if kind == "Linear4bit":
        return _from_four_bit(module, arena)
    if isinstance(module, Conv1D):
        module = to_linear(module)
    if type(module) is not nn.Linear or module.weight.dtype not in FORMATS:
        return None
    dense = FORMATS[module.weight.dtype]
    if not kernels.supports(dense, module.in_features):
        return None
    return NativeLinear(dense, module.weight, module.bias, arena=arena)


def _from_int8(module: Any, arena: Arena) -> NativeLinear | None:
    """LLM.int8 at threshold 0 is this very product; above it, outlier columns are bitsandbytes' business."""
    scales = getattr(module.weight, "SCB", None)
    if scales is None or module.state.threshold or not kernels.supports("int8", module.in_features):
        return None
    return NativeLinear("int8", module.weight.data, module.bias, scales.float() / 127, arena=arena)


def _from_four_bit(module: Any, arena: Arena) -> NativeLinear | None:
    state = getattr(module.weight, "quant_state", None)
    inputs, outputs = module.in_features, module.out_features
    if state is None or inputs % state.blocksize or not kernels.supports("four-bit", state.blocksize):
        return None
    four_bit = kernels.FourBit(state.code, state.blocksize, state.absmax)
    if state.nested:
        if state.state2.blocksize != 256:
            return None
        four_bit.nested_table, four_bit.nested_scales = state.state2.code, state.state2.absmax
        four_bit.nested_offset = float(state.offset)
    codes = module.weight.data.reshape(outputs, inputs // 2)
    return NativeLinear("four-bit", codes, module.bias, four_bit=four_bit, arena=arena)
