"""The weights in a graph's file: their layers, formats and bytes."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loaders.layers.affine_blocks import unpack
from loaders.layers.layer_weights import LayerWeights, dense

_FACTORS = "bitdial.input_scale"
"""Metadata of a graph: by layer and channel, powers of two that its weights include."""


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
        """The operation that multiplies or looks up each layer's matrix, and the matrix, by layer."""
        nodes, found = {node.name: node for node in self._graph}, {}
        factors = json.loads(self._model.metadata_props.get(_FACTORS, "{}"))
        for name in self._layers:
            node = nodes[name]
            weights = _READERS[node.op_type](node)
            if name in factors:
                weights = replace(weights, input_scale=_factor(factors[name], weights.shape[1]))
            found[name] = node.op_type, weights
        return found

    def by_row(self) -> list[str]:
        """The layers that quantize each row of activations by its own largest magnitude."""
        products = [node for node in self._graph if node.op_type == "MatMulIntegerToFloat"]
        divided = {node: node.inputs[0].producer().inputs[0].producer() for node in products}
        return [node.name for node, by in divided.items() if by is not None and by.op_type == "Div"]

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
        uses = [use.node for use in value.uses()]
        after = [use.node for node in uses if node.op_type in _FOLDED for use in node.outputs[0].uses()]
        kinds = {node.op_type for node in (*uses, *after)}
        return bool(kinds & _LOOKUPS) and bool(kinds & _REARRANGING)

    def close(self) -> None:
        self._model = None

    @property
    def _graph(self) -> Any:
        if self._model is None:
            raise RuntimeError("the runner is closed")
        return self._model.graph


def write_factors(model: Any, factors: Mapping[str, Tensor]) -> None:
    """Notes the powers of two that the weights of a graph include, by layer, for ``GraphWeights``."""
    exponents = {
        name: {str(at): power for at, power in enumerate(factor.log2().int().tolist()) if power}
        for name, factor in factors.items()
    }
    if any(exponents.values()):
        model.metadata_props[_FACTORS] = json.dumps(exponents)


def _factor(exponents: Mapping[str, int], width: int) -> Tensor:
    powers = torch.zeros(width)
    for channel, power in exponents.items():
        powers[int(channel)] = power
    return powers.exp2()


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
    looked_up = codes.const_value is None  # and multiplied as the transpose
    return _int8(_read(_source(codes)) if looked_up else _read(codes).t(), scales)


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
    codes, scales, zeros = (
        _read(_source(value)) for value in (inputs[1 if node.op_type == "MatMulNBits" else 0], *inputs[2:4])
    )
    bits = node.attributes["bits"].as_int()
    block = node.attributes["block_size"].as_int()
    outputs = codes.shape[0]
    stored = codes[0].numel() * 8 // bits
    width = node.attributes["K"].as_int() if node.op_type == "MatMulNBits" else stored

    def dequantize() -> Tensor:
        values = unpack(codes.view(outputs, -1), bits).view(outputs, -1, block).float()
        middle = unpack(zeros.view(outputs, -1), bits)[:, : values.shape[1], None].float()
        return ((values - middle) * scales.view(outputs, -1, 1)).view(outputs, -1)[:, :width]

    kind = "int8" if bits == 8 else f"{bits}-bit"
    state = [("scales", scales), ("zero_points", zeros)]
    return LayerWeights(kind, (outputs, width), codes, dequantize, state)


def _source(value: Any) -> Any:
    """The initializer that a value is, or is another shape of."""
    return value if value.const_value is not None else value.producer().inputs[0]


_FOLDED = {"Transpose", "Reshape"}  # computed from constants when a session opens
_REARRANGING = {"MatMulIntegerToFloat", "MatMulNBits"}
_LOOKUPS = {"Gather", "GatherBlockQuantized"}
_READERS: Mapping[str, Callable[[Any], LayerWeights]] = {
    "MatMul": _matmul,
    "MatMulIntegerToFloat": _integers,
    "MatMulNBits": _blocks,
    "Gather": _lookup,
    "GatherBlockQuantized": _blocks,
}
