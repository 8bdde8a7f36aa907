"""A whole forward pass of a decoder-only transformer in one call."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from loaders.kernels import structures
from loaders.kernels.decoder_layers import ACTIVATIONS, Layer, Norm, Shape, check_ends, check_layers
from loaders.kernels.library import Library, check_status
from loaders.kernels.matrix import PackedMatrix
from loaders.kernels.structures import I64, P

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class BeyondHalf(ArithmeticError):
    """Keys or values of a pass do not fit into float16; its results are invalid."""


@dataclass
class KVBlocks:
    """Keys and values of sequences, in blocks of (layers, 2, kv heads, block tokens, dim).

    Args:
        address: of block 0.
        block_bytes: from block to block.
        tables: (slots, length) int32, the blocks of each slot in order; every entry is a block's id.
        half: float16; otherwise float32.
        rounded: float32 whose values are rounded to float16 wherever they fit.
    """

    address: int
    block_bytes: int
    tables: np.ndarray[tuple[int, int], np.dtype[np.int32]]
    half: bool
    rounded: bool = False
    struct: structures.Cache = field(init=False)

    def __post_init__(self) -> None:
        assert self.tables.dtype == np.int32
        assert self.tables.flags.c_contiguous
        kind = 1 if self.half else 2 * self.rounded  # FLOAT, HALF, ROUNDED of attention.h
        length = self.tables.shape[1]
        self.struct = structures.Cache(self.address, self.tables.ctypes.data, length, self.block_bytes, kind)


class Decoder:
    """A decoder that refers to the model's tensors, without a copy.

    Args:
        tokens: (vocabulary, width) embeddings of any float type, or an int8 matrix.
        token_scales: (width,) factors of their channels, besides the architecture's; None: 1.
        positions: (context, width) embeddings, or None.
        turns: (context, 2 · pairs) float32: of each position the cosines and the sines of the angles by which
            the first 2 · pairs values of a head are rotated; or None.
        head: (vocabulary, width).

    Raises:
        ValueError: shapes that the kernels don't support; C checks none of them.
    """

    def __init__(
        self,
        library: Library,
        shape: Shape,
        tokens: Tensor | PackedMatrix,
        token_scales: Tensor | None,
        positions: Tensor | None,
        turns: Tensor | None,
        layers: Sequence[Layer],
        last: Norm,
        head: PackedMatrix,
    ) -> None:
        shape.check()
        check_layers(shape, layers)
        self._library, self._head, self._turns = library, head, turns
        self._kept: list[PackedMatrix] = [head]  # the structures point into these
        looked_up = tokens if isinstance(tokens, PackedMatrix) else self._packed(tokens)
        check_ends(shape, looked_up, positions, turns, last, head)
        self._token_scales = torch.full((shape.width,), shape.embedding_scale)
        if token_scales is not None:
            self._token_scales *= token_scales
        self._layers = (structures.Layer * len(layers))(*(self._layer(layer) for layer in layers))
        contexts = [table.shape[0] for table in (positions, turns) if table is not None]
        self._vocabulary, self._context = looked_up.outputs, min(contexts)
        self._model = structures.Decoder(
            shape.width,
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            shape.inner,
            len(layers),
            int(shape.norm == "rms"),
            ACTIVATIONS.index(shape.activation),
            shape.gated,
            shape.interleaved,
            shape.parallel,
            0 if turns is None else turns.shape[1] // 2,
            ctypes.addressof(looked_up.struct),
            self._token_scales.data_ptr(),
            None if positions is None else ctypes.addressof(self._matrix(positions)),
            None if turns is None else turns.data_ptr(),
            ctypes.addressof(self._layers),
            self._norm(last),
            ctypes.addressof(head.struct),
            shape.epsilon,
            shape.attention_scale,
        )

    def __call__(
        self, cache: KVBlocks, slots: Sequence[int], positions: Sequence[int], ids: Sequence[int], wanted: int
    ) -> Tensor:
        """Computes one row per id and appends its keys and values; a row's bits depend on its own past alone.

        Args:
            cache: the tables have the blocks of all ``positions``.
            slots, positions: of each row; rows of one slot are adjacent, in ascending order.
            wanted: logits are returned for this many last rows.

        Returns: (wanted, vocabulary) float32.

        Raises:
            IndexError: an id without an embedding, or a position outside the context or the tables.
            MemoryError: the scratch memory can't be allocated.
            BeyondHalf: the cache is float16, and this pass's keys or values do not fit.
        """
        count, (tables, length) = len(ids), cache.tables.shape
        if not (min(ids) >= 0 and max(ids) < self._vocabulary):
            raise IndexError("a token id outside the vocabulary")
        if min(positions) < 0 or max(positions) >= min(self._context, length * self._library.block_tokens):
            raise IndexError("a position outside the context")
        if min(slots) < 0 or max(slots) >= tables:
            raise IndexError("a slot without a table")
        array = I64 * count
        held = [array(*values) for values in (ids, slots, positions)]
        rows = structures.TokenRows(*map(ctypes.addressof, held), count)
        logits = torch.empty(wanted, self._head.outputs, dtype=torch.float32)
        status = self._library.decode(
            ctypes.addressof(self._model),
            ctypes.addressof(rows),
            ctypes.addressof(cache.struct),
            wanted,
            logits.data_ptr(),
            torch.get_num_threads(),
        )
        check_status(status, "a forward pass")
        if status:
            raise BeyondHalf("keys or values do not fit into float16")
        return logits

    def _layer(self, layer: Layer) -> structures.Layer:
        matrices = [*layer.qkv, layer.attention_out, *layer.mlp_in, layer.down]
        self._kept.extend(matrices)
        return structures.Layer(
            self._norm(layer.before_attention),
            self._norm(layer.before_mlp),
            self._norm(layer.query),
            self._norm(layer.key),
            (P * 3)(*(ctypes.addressof(matrix.struct) for matrix in layer.qkv)),
            ctypes.addressof(layer.attention_out.struct),
            (P * 2)(*(ctypes.addressof(matrix.struct) for matrix in layer.mlp_in)),
            ctypes.addressof(layer.down.struct),
            layer.window or 0,
        )

    def _norm(self, norm: Norm | None) -> structures.Norm:
        if norm is None:
            return structures.Norm()
        bias = structures.Matrix() if norm.bias is None else self._matrix(norm.bias[None])
        return structures.Norm(self._matrix(norm.weight[None]), bias)

    def _matrix(self, tensor: Tensor) -> structures.Matrix:
        return self._packed(tensor).struct

    def _packed(self, tensor: Tensor) -> PackedMatrix:
        packed = PackedMatrix(self._library, _DTYPES[tensor.dtype], tensor)  # type: ignore[arg-type]
        self._kept.append(packed)
        return packed
