"""One converted graph at several lengths of the cache.

A step's graph has no constant that depends on the length, so a graph for another length differs in shapes
alone; all of them share their weights. ``STAND_IN`` is a prime that no dimension of a model has.
"""

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np

from loaders.litert.steps import signature_of, step_name

STAND_IN = 251


def read(path: Path) -> Any:
    """A .tflite file as the objects of its schema."""
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model(str(path))
    for buffer in model.buffers:
        if isinstance(buffer.data, memoryview):  # else they are written byte by byte
            buffer.data = np.frombuffer(buffer.data, np.uint8)
    return model


def write(model: Any, path: Path) -> None:
    from ai_edge_litert.tools import flatbuffer_utils

    flatbuffer_utils.write_model(model, str(path))


def at_lengths(model: Any, lengths: Sequence[int]) -> None:
    """Replaces every step with one for each length, in place."""
    graphs, signatures = [], []
    constants = {at for at, buffer in enumerate(model.buffers) if buffer.data is not None}
    for signature in model.signatureDefs:
        rows, tokens, _ = signature_of(signature.signatureKey.decode())
        for length in lengths:
            name = step_name(rows, tokens, length)
            graphs.append(_resized(model.subgraphs[signature.subgraphIndex], constants, name, length))
            own = copy(signature)
            own.signatureKey, own.subgraphIndex = name, len(graphs) - 1
            signatures.append(own)
    model.subgraphs, model.signatureDefs = graphs, signatures


def _resized(graph: Any, constants: set[int], name: str, length: int) -> Any:
    resized, ends = copy(graph), {*graph.inputs, *graph.outputs}
    resized.name, resized.tensors = name, []
    for at, tensor in enumerate(graph.tensors):
        own = copy(tensor)
        if at not in ends and tensor.buffer not in constants:
            own.name = None  # long, and of no use
        if tensor.shape is not None and STAND_IN in tensor.shape:
            own.shape = np.where(np.asarray(tensor.shape) == STAND_IN, length, tensor.shape).astype(np.int32)
        resized.tensors.append(own)
    return resized
