"""Calibrates the matrix products of a converted model: which have constant ranges of activations, and which
ranges. Runs in the converter's environment.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from loaders.litert.lengths import STAND_IN, read
from loaders.litert.messages import tell
from loaders.litert.ranges import Layer, Read, find_ranges
from loaders.litert.steps import CHUNK, Description, step_name

_JUDGED = 4  # one sample of so many measures the errors of the ranges found on the others
_LOWEST = np.finfo(np.float32).min
_STEP = step_name(1, CHUNK, STAND_IN)


class Calibration(NamedTuple):
    """What the quantizer is given.

    Args:
        ranges: of activations, by tensor, as ai-edge-quantizer has them.
        operators: a pattern of the names of the operators that have constant ranges; empty if none has.
        dynamic: the model's layers that have none.
    """

    ranges: Mapping[str, Any]
    operators: str
    dynamic: Sequence[str]


class _Product(NamedTuple):
    """A fully connected operator: places of its tensors, and the buffer of its matrix."""

    buffer: int
    matrix: int
    before: int
    after: int


def calibrate(graph: Path, samples: Any, least_sqnr_db: float) -> Calibration:
    """Constant ranges for the layers whose outputs keep ``least_sqnr_db``, but not for the head.

    The head's outputs are the logits, which 256 levels are too few for.

    Args:
        graph: folder of the converted model.
        samples: (samples, length) token ids.
    """
    torch.set_num_threads(1)  # a chunk's tensors are small: threads would wait for each other
    description = Description.from_json((graph / "graph.json").read_text())
    model = read(graph / "graph.tflite")
    place = next(s.subgraphIndex for s in model.signatureDefs if s.signatureKey.decode() == _STEP)
    tensors = model.subgraphs[place].tensors
    products = [
        one for one in _products(model, place) if tensors[one.matrix].shape[0] != description.vocabulary
    ]
    layers = [Layer(_matrix(model, tensors[one.matrix]), one.before, one.after) for one in products]
    observed, judged = observed_and_judged(samples)
    passes = _Passes(graph / "graph.tflite", place, description, len(observed) + len(judged))
    found = find_ranges(layers, passes.of(observed), passes.of(judged))
    kept = {
        one.buffer: one
        for one, sqnr_db in zip(products, found.sqnr_db, strict=True)
        if sqnr_db >= least_sqnr_db
    }
    static = {name for one in kept.values() for name in description.names.get(_name(tensors[one.matrix]), ())}
    everything = {name for names in description.names.values() for name in names}
    ranges, operators = {}, []
    for at in range(len(model.subgraphs)):  # all steps agree
        for product in _products(model, at):
            if (one := kept.get(product.buffer)) is not None:
                own = model.subgraphs[at].tensors
                ranges[_name(own[product.before])] = _limits(*found.ranges[one.before])
                ranges[_name(own[product.after])] = _limits(*found.ranges[one.after])
                operators.append(f"^{re.escape(_name(own[product.after]))};?$")
    return Calibration(ranges, "|".join(operators), sorted(everything - static))


def observed_and_judged(samples: Any) -> tuple[Any, Any]:
    """The samples on which ranges are found, and those on which their errors are measured.

    They are different ones, but of a text so short that there are fewer than four.
    """
    judged = np.arange(len(samples)) % _JUDGED == _JUDGED - 1
    return (samples[~judged], samples[judged]) if judged.any() else (samples, samples)


def _name(tensor: Any) -> str:
    return str(tensor.name.decode())


def _limits(low: float, high: float) -> dict[str, Any]:
    return {"min": np.array([[low]], np.float32), "max": np.array([[high]], np.float32)}


def _products(model: Any, graph: int) -> Iterator[_Product]:
    from ai_edge_litert import schema_py_generated as schema

    subgraph = model.subgraphs[graph]
    for operator in subgraph.operators:
        code = model.operatorCodes[operator.opcodeIndex]
        if max(code.builtinCode, code.deprecatedBuiltinCode) == schema.BuiltinOperator.FULLY_CONNECTED:
            before, matrix, after = int(operator.inputs[0]), int(operator.inputs[1]), int(operator.outputs[0])
            yield _Product(subgraph.tensors[matrix].buffer, matrix, before, after)


def _matrix(model: Any, tensor: Any) -> Tensor:
    """(outputs, inputs) as the quantizer rounds it: a scale for each output, its largest weight / 127."""
    data = bytearray(model.buffers[tensor.buffer].data)
    weight = torch.frombuffer(data, dtype=torch.float32).reshape(tuple(tensor.shape))
    scales = (weight.abs().amax(dim=1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (weight / scales).round_().mul_(scales)


class _Passes:
    """Runs the step that reads a chunk over samples, with all of its tensors to be read."""

    def __init__(self, path: Path, graph: int, description: Description, total: int) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self._interpreter: Any = Interpreter(
            model_path=str(path), num_threads=2, experimental_preserve_all_tensors=True
        )
        self._runner = self._interpreter.get_signature_runner(_STEP)
        self._graph, self._description = graph, description
        self._done, self._total = 0, total

    def of(self, samples: Any) -> Iterator[Read]:
        for sample in samples:
            yield from self._chunks(sample)
            self._done += 1
            tell("calibrating", self._done, self._total)

    def _read(self, at: int) -> Tensor:
        return torch.from_numpy(self._interpreter.get_tensor(at, self._graph))

    def _chunks(self, sample: Any) -> Iterator[Callable[[int], Tensor]]:
        described, one = self._description, np.ones(1, np.float32)
        caches = (described.heads, STAND_IN, described.width)
        names = [f"{side}_{layer}" for side in ("keys", "values") for layer in range(described.layers)]
        past = {name: np.zeros(caches, np.float32) for name in names}
        for start in range(0, len(sample) - CHUNK + 1, CHUNK):
            tokens = sample[None, start : start + CHUNK].astype(np.int32)
            positions = np.arange(start, start + CHUNK, dtype=np.int32)[None]
            masks = {
                f"masks_{at}": _mask(start, window, described.queries)
                for at, window in enumerate(described.windows.values())
            }
            found = self._runner(one=one, tokens=tokens, positions=positions, **masks, **past)
            yield self._read
            for name, cache in past.items():
                cache[:, start : start + CHUNK] = found[f"new_{name}"][0]


def _mask(start: int, window: int | None, queries: int) -> Any:
    distance = np.arange(start, start + CHUNK)[:, None] - np.arange(STAND_IN)
    hidden = np.arange(STAND_IN)[None] >= start
    if window is not None:
        hidden = hidden | (distance >= window)
    mask = np.where(np.broadcast_to(hidden, distance.shape), _LOWEST, np.float32(0))
    return np.tile(mask, (queries, 1))[None].astype(np.float32)
