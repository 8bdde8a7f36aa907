"""A whole forward pass of GPT-2 in one call."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loaders.kernels import structures
from loaders.kernels.library import Library, check_status
from loaders.kernels.matrix import PackedMatrix
from loaders.kernels.structures import I64, P

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class Norm:
    """(width,) weight and bias of a layer normalization, of any float type."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Layer:
    """One block; qkv is (3 · width, width), attention_out (width, width), up (inner, width)."""

    before_attention: Norm
    qkv: PackedMatrix
    attention_out: PackedMatrix
    before_mlp: Norm
    up: PackedMatrix
    down: PackedMatrix


class BeyondHalf(ArithmeticError):
    """Keys or values of a pass do not fit into float16; its results are invalid."""


class KeyValues:
    """Keys and values of every layer; (slots, heads, context, dim) each, contiguous, float32 or float16.

    Args:
        rounded: float32 tensors whose values are rounded to float16 wherever they fit.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], rounded: bool = False) -> None:
        self.layers = layers
        count, context = len(layers), layers[0][0].shape[2] if layers else 0
        self._keys = (P * count)(*(keys.data_ptr() for keys, _ in layers))
        self._values = (P * count)(*(values.data_ptr() for _, values in layers))
        half = count > 0 and layers[0][0].dtype == torch.float16
        kind = 1 if half else 2 * rounded  # FLOAT, HALF, ROUNDED of attention.h
        self.struct = structures.Cache(
            ctypes.addressof(self._keys), ctypes.addressof(self._values), context, kind
        )


def _check_shapes(
    heads: int, tokens: Tensor, positions: Tensor, layers: Sequence[Layer], last: Norm, head: PackedMatrix
) -> None:
    width = tokens.shape[1]
    inner = layers[0].up.outputs if layers else 0
    if (
        not layers
        or heads < 1
        or not width
        or width % 32
        or width % heads
        or (width // heads) % 8
        or inner % 8
    ):
        raise ValueError(f"{len(layers)} layers of {heads} heads and width {width}, {inner} within")
    norms = [last, *(norm for layer in layers for norm in (layer.before_attention, layer.before_mlp))]
    fits = positions.shape[1:] == (width,) and head.inputs == width
    fits &= all(tensor.shape == (width,) for norm in norms for tensor in (norm.weight, norm.bias))
    for layer in layers:
        for matrix, (outputs, inputs) in (
            (layer.qkv, (3 * width, width)),
            (layer.attention_out, (width, width)),
            (layer.up, (inner, width)),
            (layer.down, (width, inner)),
        ):
            fits &= (matrix.outputs, matrix.inputs) == (outputs, inputs)
    if not fits:
        raise ValueError("the model's tensors don't fit each other")


class GPT2:
    """A GPT-2 that refers to the model's tensors, without a copy.

    Args:
        tokens, positions: (vocabulary, width), (context, width) embeddings of any float type.
        head: (vocabulary, width).

    Raises:
        ValueError: shapes that the kernels don't support; C checks none of them.
    """

    def __init__(
        self,
        library: Library,
        heads: int,
        epsilon: float,
        tokens: Tensor,
        positions: Tensor,
        layers: Sequence[Layer],
        last: Norm,
        head: PackedMatrix,
    ) -> None:
        _check_shapes(heads, tokens, positions, layers, last, head)
        self._library, self._head = library, head
        self._kept: list[PackedMatrix] = [head]  # the structures point into these
        self._layers = (structures.Layer * len(layers))(*(self._layer(layer) for layer in layers))
        self._model = structures.Model(
            tokens.shape[1],
            heads,
            len(layers),
            ctypes.addressof(self._matrix(tokens)),
            ctypes.addressof(self._matrix(positions)),
            ctypes.addressof(self._layers),
            self._norm(last),
            ctypes.addressof(head.struct),
            epsilon,
        )
        self._vocabulary, self._context = tokens.shape[0], positions.shape[0]

    def __call__(
        self,
        cache: KeyValues,
        slots: Sequence[int],
        positions: Sequence[int],
        ids: Sequence[int],
        wanted: int,
    ) -> Tensor:
        """Computes one row per id and appends its keys and values; a row's bits depend on its own past alone.

        Args:
            slots, positions: of each row; rows of one slot are adjacent, in ascending order.
            wanted: logits are returned for this many last rows.

        Returns: (wanted, vocabulary) float32.

        Raises:
            IndexError: an id or a position without an embedding.
            MemoryError: the scratch memory can't be allocated.
            BeyondHalf: the cache is float16, and this pass's keys or values do not fit.
        """
        count = len(ids)
        if not (min(ids) >= 0 and max(ids) < self._vocabulary and min(positions) >= 0):
            raise IndexError("a token id outside the vocabulary")
        if max(positions) >= self._context:
            raise IndexError("a position outside the context")
        array = I64 * count
        held = [array(*values) for values in (ids, slots, positions)]
        rows = structures.TokenRows(*map(ctypes.addressof, held), count)
        logits = torch.empty(wanted, self._head.outputs, dtype=torch.float32)
        threads = torch.get_num_threads()
        status = self._library.gpt2(
            ctypes.addressof(self._model),
            ctypes.addressof(rows),
            ctypes.addressof(cache.struct),
            wanted,
            logits.data_ptr(),
            threads,
        )
        check_status(status, "a forward pass")
        if status:
            raise BeyondHalf("keys or values do not fit into float16")
        return logits

    def _layer(self, layer: Layer) -> structures.Layer:
        matrices = (layer.qkv, layer.attention_out, layer.up, layer.down)
        self._kept.extend(matrices)
        return structures.Layer(
            self._norm(layer.before_attention),
            self._norm(layer.before_mlp),
            *(ctypes.addressof(matrix.struct) for matrix in matrices),
        )

    def _norm(self, norm: Norm) -> structures.Norm:
        return structures.Norm(self._matrix(norm.weight[None]), self._matrix(norm.bias[None]))

    def _matrix(self, tensor: Tensor) -> structures.Matrix:
        packed = PackedMatrix(self._library, _DTYPES[tensor.dtype], tensor)  # type: ignore[arg-type]
        self._kept.append(packed)
        return packed.struct
