"""A weight matrix in the layout of the kernels, and its product with rows of activations."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from loaders.kernels import structures
from loaders.kernels.library import FORMATS, Format, Library, check_status

INT8_LANES = 16
"""Groups of a row of int8 weights that can have a scale each: of weight k the group is k / 4 % 16."""
ACTIVATION_GROUP = 16
"""Activations that share a scale when they are multiplied with int8 weights; 4 at the end of a row."""
_ROWS = 4096  # outputs whose offsets are computed at a time
INT4_GROUP = 16
"""Weights of an int4 matrix that share a scale: those multiplied with a group of activations."""
_BIAS_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # indices into FORMATS


@dataclass
class FourBit:
    """The quantization state of a matrix in ``four-bit`` or ``int4``.

    Args:
        table: (16,) float32, the value of each code; int4: int8.
        block: number of weights per scale; int4: ``INT4_GROUP``.
        scales: (weights / block,) float32; or, if nested, uint8 codes into ``nested_table``; int4: (outputs,
            inputs / block) int8, of the groups in ``loaders.layers.int4_codes``.
        nested_table: (256,) float32.
        nested_scales: one float32 per 256 scales; int4: one per output, by which its scales are multiplied.
        nested_offset: added to each nested scale.
    """

    table: Tensor
    block: int
    scales: Tensor
    nested_table: Tensor | None = None
    nested_scales: Tensor | None = None
    nested_offset: float = 0.0


@dataclass
class PackedMatrix:
    """A weight matrix that refers to the given tensors, without a copy.

    Args:
        library: multiplies it.
        kind: the format of ``data``.
        data: (outputs, inputs), contiguous; four-bit: (outputs, inputs / 2) bytes, the first of each two
            weights in the upper half; int4: in the order of ``loaders.layers.int4_codes``.
        scales: static-int8: (outputs,) float32. int8: the same, or (outputs, 16) bfloat16, of the weights k
            with k / 4 % 16 = lane.
        bias: (outputs,) of any float type, or None.
        input_factors: static-int8: (2, inputs) float32, factors and whole zero points of the activations,
            whose codes are round(x · factor + zero point). Weights and ``scales`` include 1 / factor.
            Matrices with the same tensor share packed activations.
    """

    library: Library
    kind: Format
    data: Tensor
    scales: Tensor | None = None
    bias: Tensor | None = None
    four_bit: FourBit | None = None
    input_factors: Tensor | None = None

    def __post_init__(self) -> None:
        tensors = (self.data, self.scales, self.bias, self.input_factors)
        assert all(t is None or (t.is_contiguous() and t.device.type == "cpu") for t in tensors)
        self.offsets: Tensor | None = None  # static-int8: of the sum of each output
        self.outputs = self.data.shape[0]
        self.inputs = self.data.shape[1] * (2 if self.kind in ("four-bit", "int4") else 1)
        self.struct = structures.Matrix(
            FORMATS.index(self.kind), self.outputs, self.inputs, self.data.data_ptr()
        )
        self.struct.bias = _address(self.bias)
        if self.scales is not None and self.scales.dim() == 2:
            assert self.scales.shape == (self.outputs, INT8_LANES)
            assert self.scales.dtype == torch.bfloat16
            self.struct.lane_scales = _address(self.scales)
        else:
            self.struct.scales = _address(self.scales)
        self.struct.bias_format = 0 if self.bias is None else _BIAS_FORMATS[self.bias.dtype]
        if self.four_bit is not None:
            self._set_four_bit(self.four_bit)
        if self.input_factors is not None:
            self._set_static(self.input_factors)
        self._address = ctypes.addressof(self.struct)

    def _set_four_bit(self, state: FourBit) -> None:
        if self.kind == "int4":
            self._set_int4(state)
            return
        self.struct.table, self.struct.block = state.table.data_ptr(), state.block
        if state.nested_table is None:
            self.struct.scales = state.scales.data_ptr()
        else:
            self.struct.codes = state.scales.data_ptr()
            self.struct.nested_table = state.nested_table.data_ptr()
            self.struct.nested_scales = _address(state.nested_scales)
            self.struct.nested_offset = state.nested_offset

    def _set_static(self, factors: Tensor) -> None:
        assert factors.shape == (2, self.inputs)
        assert factors.dtype == torch.float32
        assert self.scales is not None
        assert self.scales.shape == (self.outputs,)
        zero_points = factors[1].double() + self.library.static_zero_point
        sums = [codes.double() @ zero_points for codes in self.data.split(_ROWS)]  # exact: below 2⁵³
        self.offsets = -torch.cat(sums).int()
        self.struct.input_factors, self.struct.offsets = factors.data_ptr(), self.offsets.data_ptr()

    def _set_int4(self, state: FourBit) -> None:
        assert state.nested_scales is not None
        assert state.table.dtype == state.scales.dtype == torch.int8
        assert state.scales.shape == (self.outputs, self.inputs // INT4_GROUP)
        assert state.nested_scales.shape == (self.outputs,)
        self.struct.values, self.struct.group_scales = state.table.data_ptr(), state.scales.data_ptr()
        self.struct.scales = state.nested_scales.data_ptr()

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Returns x Wᵀ + bias (+ residual), (rows, outputs), of (rows, inputs) float32; rows are independent.

        Raises:
            MemoryError
        """
        rows = x.shape[0]
        y = torch.empty(rows, self.outputs, dtype=torch.float32)
        if not rows:
            return y
        added, threads = _address(residual), torch.get_num_threads()
        status = self.library.linear(self._address, x.data_ptr(), rows, added, y.data_ptr(), threads)
        check_status(status, "a matrix product")
        return y


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
