"""The layers of a decoder as the kernels expect them, and checks of their shapes, which C doesn't make."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from loaders.kernels.matrix import PackedMatrix

Activation = Literal["gelu_tanh", "gelu", "silu", "relu"]
ACTIVATIONS: tuple[Activation, ...] = ("gelu_tanh", "gelu", "silu", "relu")  # as in rowwise.h


@dataclass(frozen=True)
class Norm:
    """(width,) weight and bias of a normalization, of any float type."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Layer:
    """One block.

    Args:
        qkv: query (heads · dim, width), key and value (kv heads · dim, width); or one that contains all.
        attention_out: (width, heads · dim).
        mlp_in: gate and up (inner, width), or one that contains both; without a gate, up alone.
        down: (width, inner).
        query, key: norms of each head, of (dim,) weights.
        window: tokens that a token attends to, itself included; None: all.
    """

    before_attention: Norm
    qkv: Sequence[PackedMatrix]
    attention_out: PackedMatrix
    before_mlp: Norm
    mlp_in: Sequence[PackedMatrix]
    down: PackedMatrix
    query: Norm | None = None
    key: Norm | None = None
    window: int | None = None


@dataclass(frozen=True)
class Shape:
    """What the kernels need to know of an architecture.

    Args:
        gated: the MLP is activation(gate) · up.
        interleaved: a fused qkv has query, key and value of the first head, then of the second …
        parallel: attention and MLP read the same residual stream.
        norm: all norms are of this kind; those of heads are always ``rms``.
        attention_scale: of scores, before the softmax.
        embedding_scale: of token embeddings.
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    norm: Literal["layer", "rms"]
    epsilon: float
    activation: Activation
    gated: bool
    attention_scale: float
    interleaved: bool = False
    parallel: bool = False
    embedding_scale: float = 1.0

    def check(self) -> None:
        """
        Raises:
            ValueError: the kernels don't support these numbers.
        """
        sizes = (self.width, self.heads, self.kv_heads, self.head_dim, self.inner)
        if min(sizes) < 1 or self.width % 32 or self.head_dim % 8 or self.inner % 8:
            raise ValueError(
                f"width {self.width} is not a multiple of 32, head dimension {self.head_dim} or inner width "
                f"{self.inner} not one of 8"
            )
        if not 0 <= self.epsilon < math.inf:
            raise ValueError(f"epsilon of norms is {self.epsilon}")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads can't share {self.kv_heads} heads of keys and values")
        if self.interleaved and self.heads != self.kv_heads:
            raise ValueError("interleaved heads that share keys and values")


def check_layers(shape: Shape, layers: Sequence[Layer]) -> None:
    """
    Raises:
        ValueError: there are none, or their shapes don't fit.
    """
    if not layers:
        raise ValueError("a decoder without layers")
    if len({(len(layer.qkv), len(layer.mlp_in)) for layer in layers}) > 1:
        raise ValueError("some layers have fused projections and others not")
    for layer in layers:
        _check_matrices(shape, layer)
        _check_norm(layer.before_attention, shape.width)
        _check_norm(layer.before_mlp, shape.width)
        for norm in (layer.query, layer.key):
            if norm is not None:
                _check_norm(norm, shape.head_dim)
                if shape.head_dim % 16:
                    raise ValueError(f"norms of heads of {shape.head_dim}, not a multiple of 16")
        if layer.window is not None and layer.window < 1:
            raise ValueError(f"a window of {layer.window} tokens")


def _check_matrices(shape: Shape, layer: Layer) -> None:
    queries, kv, inner = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.inner
    qkv = [queries + 2 * kv] if len(layer.qkv) == 1 else [queries, kv, kv]
    separate = shape.gated and len(layer.mlp_in) == 2
    mlp_in = [inner, inner] if separate else [inner * (1 + shape.gated)]
    for name, matrices, outputs, inputs in (
        ("qkv", layer.qkv, qkv, shape.width),
        ("attention_out", [layer.attention_out], [shape.width], queries),
        ("mlp_in", layer.mlp_in, mlp_in, shape.width),
        ("down", [layer.down], [shape.width], inner),
    ):
        found, expected = [(m.outputs, m.inputs) for m in matrices], [(n, inputs) for n in outputs]
        if found != expected:
            raise ValueError(f"{name} is {found}, not {expected}")


def _check_norm(norm: Norm, width: int) -> None:
    for tensor in (norm.weight, norm.bias):
        if tensor is not None and tensor.shape != (width,):
            raise ValueError(f"a norm of {tuple(tensor.shape)}, not ({width},)")


def check_ends(
    shape: Shape,
    tokens: PackedMatrix,
    positions: Tensor | None,
    turns: Tensor | None,
    last: Norm,
    head: PackedMatrix,
) -> None:
    """
    Raises:
        ValueError: embeddings, angles, last norm or head don't fit.
    """
    _check_norm(last, shape.width)
    if tokens.inputs != shape.width or head.inputs != shape.width:
        raise ValueError("embeddings or head of another width")
    if positions is None and turns is None:
        raise ValueError("neither learned nor rotary positions")
    if positions is not None and positions.shape[1:] != (shape.width,):
        raise ValueError("position embeddings of another width")
    if turns is not None and (
        turns.dtype != torch.float32
        or not turns.is_contiguous()
        or turns.dim() != 2
        or turns.shape[1] % 2
        or turns.shape[1] > shape.head_dim
    ):
        raise ValueError(f"angles of {tuple(turns.shape)} for heads of {shape.head_dim}")
