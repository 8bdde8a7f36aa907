"""What a .tflite file holds: its bytes by type, and the matrices of the model's layers."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loaders.base import Footprint, KeptLayer
from loaders.layers.layer_weights import LayerWeights
from loaders.litert.lengths import read

_TYPES = {0: torch.float32, 1: torch.float16, 2: torch.int32, 4: torch.int64, 6: torch.bool, 9: torch.int8}
"""TensorType of the schema → torch's; a .tflite file of these precisions has no others."""


class Weights:
    """The constants of a file, each buffer once, although several steps and layers read it."""

    def __init__(self, path: Path, names: Mapping[str, Sequence[str]]) -> None:
        """``names``: the model's layers by the name of the tensor that holds their matrix."""
        model = read(path)
        self.layers: dict[str, LayerWeights] = {}
        self.by_dtype: dict[str, int] = defaultdict(int)
        self.state: dict[str, int] = defaultdict(int)
        seen: set[int] = set()
        for tensor in _constants(model):
            if tensor.buffer in seen:
                continue
            seen.add(tensor.buffer)
            weights = _weights(tensor, model.buffers[tensor.buffer].data)
            self._count(weights.weight, "")
            for role, one in weights.state:
                self._count(one, role)
            for layer in names.get(tensor.name.decode(), ()):
                self.layers.setdefault(layer, weights)

    def _count(self, tensor: Tensor, role: str) -> None:
        self.by_dtype[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
        if role:
            self.state[role] += tensor.nbytes

    def footprint(self, parameters: int, embeddings: set[str], reason: str) -> Footprint:
        """The bytes of the file's constants.

        Args:
            parameters: of the checkpoint, a tied head counted once.
            embeddings: names of the layers that are looked up.
            reason: why a layer's matrix was not quantized.
        """
        total = sum(self.by_dtype.values())
        quantized = [name for name, one in self.layers.items() if one.quantized]
        kept = [KeptLayer(name, reason) for name, one in self.layers.items() if not one.quantized]
        multiplied = {
            name: math.prod(self.layers[name].shape) for name in self.layers if name not in embeddings
        }
        share = sum(size for name, size in multiplied.items() if self.layers[name].quantized)
        shared = {self.layers[name].weight.data_ptr() for name in multiplied}
        looked_up = [self.layers[name] for name in embeddings if name in self.layers]
        return Footprint(
            weights_bytes=total,
            by_dtype=dict(self.by_dtype),
            quantization_state=dict(self.state),
            transformers_footprint_bytes=total - sum(self.state.values()),
            bits_per_weight=8 * total / parameters,
            parameters=parameters,
            lookup_bytes=sum(one.nbytes for one in looked_up if one.weight.data_ptr() not in shared),
            quantized=quantized,
            kept=kept,
            quantized_share=share / max(1, sum(multiplied.values())),
        )


def _constants(model: Any) -> Iterator[Any]:
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            data = model.buffers[tensor.buffer].data
            if data is not None and len(data):
                yield tensor


def _weights(tensor: Any, data: Any) -> LayerWeights:
    values = torch.from_numpy(np.array(data)).view(_TYPES[tensor.type])
    shape = tuple(int(size) for size in (tensor.shape if tensor.shape is not None else ()))
    values = values.reshape(shape)
    name = str(values.dtype).removeprefix("torch.")
    rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, values.numel())
    quantization = tensor.quantization
    if quantization is None or quantization.scale is None or values.dtype != torch.int8:
        return LayerWeights(name, (rows, columns), values, values.float)
    scales = torch.tensor(np.array(quantization.scale), dtype=torch.float32)
    zeros = torch.tensor(np.array(quantization.zeroPoint), dtype=torch.int64)
    dequantize = partial(_dequantize, values, scales, zeros)
    return LayerWeights(
        name, (rows, columns), values, dequantize, (("scales", scales), ("zero_points", zeros))
    )


def _dequantize(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """scale × (code − zero point), for each row: https://ai.google.dev/edge/litert/conversion/tensorflow/quantization/quantization_spec"""
    return (codes.float() - zeros.float()[:, None]) * scales[:, None]
