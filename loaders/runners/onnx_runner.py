"""The Runner of an exported graph on ONNX Runtime.

The cache is this runner's: the graph's inputs and outputs are bound to it, and its attention appends to each
row in place. A step computes consecutive rows of the cache, so that no row is copied; rows change places only
when a step's slots are not beside each other.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loaders.base import ModelSpec
from loaders.layers.layer_weights import LayerWeights
from loaders.onnx.session import open_session
from loaders.onnx.weights import GraphWeights
from loaders.runner import Logits, Runner

_MOST_BINDINGS = 64
_Array = np.ndarray[Any, np.dtype[Any]]


class OnnxRunner(Runner):
    """Implements ``LayerRunner`` and ``ReportingRunner`` as well.

    Args:
        path: the graph, as ``loaders.onnx.export`` describes it.
    """

    def __init__(self, path: Path, spec: ModelSpec, weights: GraphWeights) -> None:
        self.slots, self.context = spec.slots, spec.max_tokens
        self.vocabulary = spec.checkpoint.vocabulary
        self.path, self._weights = path, weights
        self._session = open_session(path, spec.threads or torch.get_num_threads(), spec.device)
        shapes = {one.name: one.shape for one in self._session.get_inputs() if one.name.startswith("past.")}
        self._names = list(shapes)
        self._cache = [_zeros(self.slots, shape[1], self.context, shape[3]) for shape in shapes.values()]
        self._lengths = [0] * self.slots  # by slot
        self._rows = list(range(self.slots))  # the row of the cache that each slot has
        self._steps: dict[tuple[int, int], _Step] = {}  # decode steps by first row and number of rows

    def prefill(self, slot: int, ids: Sequence[int], logits: Logits = "last") -> Tensor | None:
        count, row = len(ids), self._rows[slot]
        self._check(self._lengths[slot] + count)
        step = _Step(self._live, self._names, [one[row : row + 1] for one in self._cache])
        found = step.run([ids], [self._lengths[slot]], count if logits == "all" else 1, self.vocabulary)
        self._lengths[slot] += count
        return None if logits == "none" else found[0]

    def decode(self, slots: Sequence[int], ids: Sequence[int]) -> Tensor:
        for slot in slots:
            self._check(self._lengths[slot] + 1)
        first, order = self._beside_each_other(slots)
        step = self._steps.get((first, len(slots)))
        if step is None:
            if len(self._steps) >= _MOST_BINDINGS:
                self._steps.clear()
            rows = [one[first : first + len(slots)] for one in self._cache]
            step = self._steps[first, len(slots)] = _Step(self._live, self._names, rows)
        found = step.run(
            [[ids[at]] for at in order], [self._lengths[slots[at]] for at in order], 1, self.vocabulary
        )
        for slot in slots:
            self._lengths[slot] += 1
        if order == sorted(order):
            return found[:, 0]
        places = torch.empty(len(order), dtype=torch.int64)
        places[torch.tensor(order)] = torch.arange(len(order))
        return found[places, 0]

    def score_together(self, texts: Sequence[Sequence[int]], kept: int) -> Tensor:
        self._check(len(texts[0]))
        logits = []
        for ids in texts:
            scratch = [np.empty((1, one.shape[1], len(ids), one.shape[3]), one.dtype) for one in self._cache]
            step = _Step(self._live, self._names, scratch)
            logits.append(step.run([ids], [0], kept, self.vocabulary))
        return torch.cat(logits)

    def free(self, slot: int) -> None:
        self._lengths[slot] = 0  # a row attends only to keys before its own end

    def close(self) -> None:
        self._session = None
        self._cache, self._steps = [], {}
        self._weights.close()

    def report(self) -> Mapping[str, Any]:
        """For ``/stats``."""
        return {"forward": f"ONNX Runtime on {self._live.get_providers()[0]}", "kv_cache_dtype": "float32"}

    def layers(self) -> Mapping[str, tuple[str, LayerWeights]]:
        return self._weights.layers()

    @property
    def kv_cache_bytes(self) -> int:
        return sum(one.nbytes for one in self._cache)

    @property
    def _live(self) -> Any:
        if self._session is None:
            raise RuntimeError("the runner is closed")
        return self._session

    def _check(self, tokens: int) -> None:
        if tokens > self.context:
            raise ValueError(f"{tokens} tokens do not fit a slot of {self.context}")

    def _beside_each_other(self, slots: Sequence[int]) -> tuple[int, list[int]]:
        """The first of the consecutive rows that the slots now have, and their indices in the order of rows."""
        wanted, count = set(slots), len(slots)
        owners = {row: slot for slot, row in enumerate(self._rows)}
        first = max(
            range(self.slots - count + 1),
            key=lambda at: sum(owners[row] in wanted for row in range(at, at + count)),
        )
        inside = range(first, first + count)
        leaving = [owners[row] for row in inside if owners[row] not in wanted]
        entering = [slot for slot in slots if self._rows[slot] not in inside]
        for slot, other in zip(entering, leaving, strict=True):
            self._swap(slot, other)
        return first, sorted(range(count), key=lambda at: self._rows[slots[at]])

    def _swap(self, slot: int, other: int) -> None:
        one, two = self._rows[slot], self._rows[other]
        mine, theirs = self._lengths[slot], self._lengths[other]
        for cache in self._cache:
            held = cache[two, :, :theirs].copy()
            cache[two, :, :mine] = cache[one, :, :mine]
            cache[one, :, :theirs] = held
        self._rows[slot], self._rows[other] = two, one


class _Step:
    """The graph bound to consecutive rows of a cache."""

    def __init__(self, session: Any, names: Sequence[str], rows: Sequence[_Array]) -> None:
        self._session, self._rows = session, rows
        self._binding, self._inputs = session.io_binding(), dict[str, _Array]()
        for name, states in zip(names, rows, strict=True):
            self._bind("past", name, states)
            self._bind("present", name.replace("past", "present"), states)
        self._logits = np.empty((0, 0, 0), np.float32)

    def run(self, ids: Sequence[Sequence[int]], starts: Sequence[int], kept: int, vocabulary: int) -> Tensor:
        """(rows, kept, vocabulary) logits after the last ``kept`` of each row's new ids; reused by the next run."""
        rows, tokens = len(ids), len(ids[0])
        ends = [start + tokens for start in starts]
        positions = np.asarray(starts, np.int64)[:, None] + np.arange(tokens)
        self._set("input_ids", np.asarray(ids, np.int64))
        self._set("position_ids", positions)
        self._set("last", np.asarray(ends, np.int32) - 1)
        self._set("total", np.asarray(max(ends), np.int32))
        self._set("kept", np.arange(tokens - kept, tokens))
        if self._logits.shape != (rows, kept, vocabulary):
            self._logits = np.empty((rows, kept, vocabulary), np.float32)
            self._bind("present", "logits", self._logits)
        self._session.run_with_iobinding(self._binding)
        return torch.from_numpy(self._logits)

    def _set(self, name: str, values: _Array) -> None:
        held = self._inputs.get(name)
        if held is not None and held.shape == values.shape:
            held[...] = values
            return
        self._inputs[name] = np.ascontiguousarray(values)
        self._bind("past", name, self._inputs[name])

    def _bind(self, role: str, name: str, array: _Array) -> None:
        bind = self._binding.bind_input if role == "past" else self._binding.bind_output
        bind(name, "cpu", 0, array.dtype.type, list(array.shape), array.ctypes.data)


def _zeros(*shape: int) -> _Array:
    """Zero pages, which the system commits as they are written."""
    return np.zeros(math.prod(shape), np.float32).reshape(shape)
