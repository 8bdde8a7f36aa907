"""The weights in a graph's file: their layers, formats and bytes."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loaders.layers.layer_weights import LayerWeights, dense


class GraphWeights:
    """Reads a saved graph's initializers; those of the layers are mapped, not copied.

    Args:
        path: a graph whose layers' products and lookups are nodes of the layers' names.
        layers: names of the model's linear layers and embeddings.
    """

    def __init__(self, path: Path, layers: Sequence[str]) -> None:
        import onnx_ir as ir  # optional

        self._model: Any = ir.load(path)
        self._layers = layers

    def layers(self) -> dict[str, tuple[str, LayerWeights]]:
        """The operation that multiplies or looks up each layer's matrix, and the matrix, by the layer's name."""
        nodes = {node.name: node for node in self._graph}
        found = {name: nodes[name] for name in self._layers}
        return {name: (node.op_type, _READERS[node.op_type](node)) for name, node in found.items()}

    def by_dtype(self) -> dict[str, int]:
        """Bytes of the initializers by element type.

        A matrix that is both looked up and multiplied from the right counts twice: ONNX Runtime keeps a
        rearranged copy for its kernel.
        """
        found: dict[str, int] = {}
        for value in self._graph.initializers.values():
            kind = str(value.const_value.dtype.numpy())
            copies = 2 if self._is_copied(value) else 1
            found[kind] = found.get(kind, 0) + copies * value.const_value.nbytes
        return found

    def _is_copied(self, value: Any) -> bool:
        kinds = {use.node.op_type for use in value.uses()}
        return bool(kinds & _LOOKUPS) and bool(kinds & {"Transpose", "MatMulNBits"})

    def close(self) -> None:
        self._model = None

    @property
    def _graph(self) -> Any:
        if self._model is None:
            raise RuntimeError("the runner is closed")
        return self._model.graph


def _read(value: Any) -> Tensor:
    """An initializer as a tensor that shares the file's pages, which nothing writes to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch: the pages are read-only
        return torch.from_numpy(value.const_value.numpy())


def _matmul(node: Any) -> LayerWeights:
    left, right = node.inputs
    from_the_left = left.const_value is not None
    weight = _read(left if from_the_left else right)
    return dense(weight if from_the_left else weight.t())


def _integers(node: Any) -> LayerWeights:
    codes, scales = node.inputs[1], _read(node.inputs[3])
    if codes.const_value is None:  # the transpose of a table that is looked up as well
        matrix = _read(codes.producer().inputs[0])
    else:
        matrix = _read(codes).t()
    return _int8(matrix, scales)


def _int8(codes: Tensor, scales: Tensor) -> LayerWeights:
    rows, width = codes.shape
    return LayerWeights(
        "int8", (rows, width), codes, lambda: codes.float() * scales[:, None], [("scales", scales)]
    )


def _lookup(node: Any) -> LayerWeights:
    table = _read(node.inputs[0])
    if table.dtype != torch.int8:
        return dense(table)
    (cast,) = (use.node for use in node.outputs[0].uses())
    (product,) = (use.node for use in cast.outputs[0].uses())
    columns = product.inputs[1].producer().inputs[0].producer()
    return _int8(table, _read(columns.inputs[0]))


def _blocks(node: Any) -> LayerWeights:
    """Of MatMulNBits or GatherBlockQuantized: unsigned codes in blocks along a row, low bits first."""
    inputs = list(node.inputs)
    data = inputs[1] if node.op_type == "MatMulNBits" else inputs[0]
    codes, scales = _read(data), _read(inputs[2])
    zeros = _read(inputs[3]) if len(inputs) > 3 and inputs[3] is not None else None
    bits = node.attributes["bits"].as_int()
    block = node.attributes["block_size"].as_int()
    outputs = codes.shape[0]
    width = codes[0].numel() * 8 // bits

    def dequantize() -> Tensor:
        values = _unpacked(codes.view(outputs, -1), bits).view(outputs, -1, block).float()
        middle: Tensor | float = float(2 ** (bits - 1))
        if zeros is not None:
            middle = _unpacked(zeros.view(outputs, -1), bits)[:, : values.shape[1], None].float()
        return ((values - middle) * scales.view(outputs, -1, 1)).view(outputs, -1)

    state = [("scales", scales), *([] if zeros is None else [("zero_points", zeros)])]
    return LayerWeights(f"{bits}-bit" if bits != 8 else "int8", (outputs, width), codes, dequantize, state)


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """(rows, bytes) → (rows, codes)."""
    if bits == 8:
        return packed
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)


_LOOKUPS = {"Gather", "GatherBlockQuantized"}
_READERS: Mapping[str, Callable[[Any], LayerWeights]] = {
    "MatMul": _matmul,
    "MatMulIntegerToFloat": _integers,
    "MatMulNBits": _blocks,
    "Gather": _lookup,
    "GatherBlockQuantized": _blocks,
}
