"""Codes and scales of trained layers in a quantized graph, in the place of those that the quantizer found."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CODES, SCALES = ".codes", ".scales"
"""What follows a layer's name in the file of trained layers."""
_INT8, _INT32 = 9, 2  # TensorType
_NEAR = 1.01  # scales: the most that two roundings of one weight differ
_Scales = NDArray[np.float32]


def keep_trained(model: Any, names: Mapping[str, Sequence[str]], file: Path) -> list[str]:
    """Puts the codes of ``file`` into a graph; returns the layers that have them now.

    Args:
        model: the graph, quantized, with a scale for each output of its layers; changed in place.
        names: the model's layers by the name of the tensor that holds their matrix.
        file: safetensors, with int8 (outputs, inputs) ``CODES`` and (outputs,) ``SCALES`` of layers.
    """
    from safetensors.numpy import load_file

    trained, kept = load_file(file), set()
    biases: set[int] = set()  # buffers that are rescaled: steps share them
    for graph in model.subgraphs:
        ratios: dict[int, _Scales] = {}
        for at, tensor in enumerate(graph.tensors):
            layer = _layer(tensor, names, trained)
            if layer is not None:
                before = _replace(model, tensor, trained[layer + CODES], trained[layer + SCALES])
                if before is not None:
                    ratios[at] = trained[layer + SCALES] / before
                    kept.add(layer)
        _rescale_biases(model, graph, ratios, biases)
    return sorted(kept)


def _layer(tensor: Any, names: Mapping[str, Sequence[str]], trained: Mapping[str, Any]) -> str | None:
    if tensor.type != _INT8 or tensor.name is None:
        return None
    return next((one for one in names.get(tensor.name.decode(), ()) if one + CODES in trained), None)


def _replace(model: Any, tensor: Any, codes: NDArray[np.int8], scales: _Scales) -> _Scales | None:
    """The scales that a tensor had before; None if it is another matrix, such as the transposed one."""
    quantization, buffer = tensor.quantization, model.buffers[tensor.buffer]
    before = np.array(quantization.scale, np.float32).reshape(-1)
    if tuple(tensor.shape) != codes.shape or before.shape != scales.shape:
        return None
    found = np.frombuffer(bytes(buffer.data), np.int8).reshape(codes.shape)
    if not np.array_equal(found, codes):  # else another step's tensor has replaced the shared buffer
        apart = np.abs(found * before[:, None] - codes * scales[:, None])
        if (apart > _NEAR * np.maximum(before, scales)[:, None]).any():
            return None
        buffer.data = np.frombuffer(codes.tobytes(), np.uint8)
    quantization.scale, quantization.zeroPoint = scales, np.zeros(len(scales), np.int64)
    return before


def _rescale_biases(model: Any, graph: Any, ratios: Mapping[int, _Scales], done: set[int]) -> None:
    """An integer bias has the product of its layer's scales of inputs and weights as scale."""
    for operator in graph.operators:
        if operator.inputs is None or len(operator.inputs) < 3:
            continue
        weight, bias = int(operator.inputs[1]), int(operator.inputs[2])
        if weight not in ratios or bias < 0 or graph.tensors[bias].type != _INT32:
            continue
        tensor = graph.tensors[bias]
        buffer, scale = model.buffers[tensor.buffer], np.array(tensor.quantization.scale, np.float32)
        if tensor.buffer not in done:
            codes = np.rint(np.frombuffer(bytes(buffer.data), np.int32) / ratios[weight])
            buffer.data = np.frombuffer(codes.astype(np.int32).tobytes(), np.uint8)
            done.add(tensor.buffer)
        tensor.quantization.scale = scale * ratios[weight]
