"""Weights as affine codes in blocks along a row, as ONNX Runtime's MatMulNBits multiplies them.

w ≈ S (q − Z) with unsigned codes q, and for each block of a row a float32 scale S and a zero point Z of the
codes' type. Four-bit blocks are chosen as those of int4 are: of several ranges the one with the least
Σ H_ii (w − ŵ)² after a least squares fit of its scale, then GPTQ's rounding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from loaders.affine import Scheme, parameters
from loaders.layers.gptq import compensated, factored, importance

BLOCK = 32
"""Weights that share a scale and a zero point."""
_FRACTIONS = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05)  # of a block's range that four-bit codes span
_SHIFTS = (-1, 0, 1)  # of its zero point
_WEIGHTS = 2**18  # whose scales are found at a time: they stay in the cache


@dataclass(frozen=True)
class AffineBlocks:
    """A quantized matrix.

    Args:
        bits: of a code, 4 or 8.
        inputs: of a row; codes behind them, up to a whole block, stand for 0.
        codes: (outputs, blocks, BLOCK) uint8, a code in each.
        scales: (outputs, blocks) float32.
        zero_points: (outputs, blocks) uint8.
    """

    bits: int
    inputs: int
    codes: Tensor
    scales: Tensor
    zero_points: Tensor

    def dequantize(self) -> Tensor:
        """(outputs, inputs) float32."""
        centred = self.codes.float() - self.zero_points.float()[..., None]
        return (centred * self.scales[..., None]).flatten(1)[:, : self.inputs]


def quantize(weight: Tensor, bits: int, hessian: Tensor | None = None) -> AffineBlocks:
    """A matrix in blocks.

    Args:
        weight: (outputs, inputs) float32.
        bits: 4 or 8.
        hessian: (inputs, inputs) Σ x xᵀ, for GPTQ; None: to the nearest codes.
    """
    inputs, top = weight.shape[1], 2**bits - 1
    known = factored(hessian)
    of_blocks = _in_blocks(importance(None if known is None else hessian, inputs)[None])[0]
    rows = max(1, _WEIGHTS // inputs)
    found = [_ranges(_in_blocks(part), of_blocks, bits) for part in weight.split(rows)]
    scales, zeros = (torch.cat(parts) for parts in zip(*found, strict=True))
    if known is not None:
        by_block, zeros_by_block = scales.t().contiguous(), zeros.t().contiguous()

        def nearest(weights: Tensor, at: int) -> Tensor:
            scale, zero = by_block[at // BLOCK], zeros_by_block[at // BLOCK]
            return (weights / scale).round_().add_(zero).clamp_(0, top).sub_(zero).mul_(scale)

        weight = compensated(weight, known, nearest)
    codes = _codes(_in_blocks(weight), scales, zeros, top)
    return AffineBlocks(bits, inputs, codes.to(torch.uint8), scales, zeros.to(torch.uint8))


def pack(values: Tensor, bits: int) -> Tensor:
    """(…, n) codes → (…, ⌈n · bits / 8⌉) bytes, low bits first."""
    if bits == 8:
        return values
    pairs: Tensor = functional.pad(values, (0, values.shape[-1] % 2)).unflatten(-1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4


def unpack(packed: Tensor, bits: int) -> Tensor:
    """(…, bytes) → (…, codes): the inverse of ``pack``, for an even number of codes."""
    if bits == 8:
        return packed
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def _in_blocks(matrix: Tensor) -> Tensor:
    """(rows, inputs) → (rows, blocks, BLOCK), zeros behind the last input."""
    blocks: Tensor = functional.pad(matrix, (0, -matrix.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    return blocks


def _codes(blocks: Tensor, scales: Tensor, zeros: Tensor, top: int) -> Tensor:
    return (blocks / scales[..., None]).round_().add_(zeros[..., None]).clamp_(0, top)


def _ranges(blocks: Tensor, of_inputs: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scales and zero points, (rows, blocks) float32 each, of (rows, blocks, BLOCK) weights."""
    low, high = blocks.aminmax(dim=-1)
    scheme = Scheme(bits, symmetric=False, signed=False)
    if bits == 8:  # fine enough for the whole range of a block
        scale, zero = parameters(low, high, scheme)
        return scale, zero.float()
    weighted, top = blocks * of_inputs, scheme.highest
    best, middle = (one.to(torch.float32) for one in parameters(low, high, scheme))
    most = torch.zeros_like(best)
    for fraction in _FRACTIONS:
        scale, usual = parameters(low * fraction, high * fraction, scheme)
        for shift in _SHIFTS:
            zero = (usual + shift).clamp(0, top).float()
            centred = _codes(blocks, scale, zero, top) - zero[..., None]
            along, length = (weighted * centred).sum(-1), (centred * centred * of_inputs).sum(-1)
            better = (along > 0) & (along * along > most * length)
            most = torch.where(better, along * along / length, most)
            best = torch.where(better, along / length, best)
            middle = torch.where(better, zero, middle)
    return best, middle
