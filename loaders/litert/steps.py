"""The steps of a .tflite file and what a runner has to know of them, shared with the converter."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

CHUNK = 32
"""Tokens of the step that reads prompts."""
DYNAMIC, TRAINED = "dynamic.json", "trained.json"
"""Files in which the converter writes the layers of these fields of a ``Description``."""
SIZES = ((1, 1), (1, CHUNK))
"""(rows, tokens) of each step. XNNPACK rounds a row otherwise alone than beside others: rows are computed one
after another, so that a row's result doesn't depend on the batch."""
_SHORTEST, _GROWTH = 128, 4  # tokens of the shortest cache; how many times longer the next one is


class Signature(NamedTuple):
    """One step: ``rows`` sequences, ``tokens`` new tokens of each, caches of ``length`` tokens."""

    rows: int
    tokens: int
    length: int


@dataclass(frozen=True)
class Description:
    """A converted model.

    Args:
        layers, heads, width: of the cache: keys and values of a token are (layers, heads, width).
        queries: that share a head of keys.
        vocabulary: logits of a token.
        windows: the attention window of each kind of layer; None: it attends to everything before it.
        names: the model's layers by the name of the tensor that holds their matrix.
        trained: of a checkpoint that was trained quantized, the layers whose codes and scales are kept.
        dynamic: of a calibrated model, the layers whose activations have no constant ranges.
    """

    layers: int
    heads: int
    width: int
    queries: int
    vocabulary: int
    windows: Mapping[str, int | None]
    names: Mapping[str, Sequence[str]]
    trained: Sequence[str] | None = None
    dynamic: Sequence[str] | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Description":
        return cls(**json.loads(text))


def step_name(rows: int, tokens: int, length: int) -> str:
    return f"step_{rows}_{tokens}_{length}"


def signature_of(name: str) -> Signature:
    _, rows, tokens, length = name.split("_")
    return Signature(int(rows), int(tokens), int(length))


def cache_lengths(context: int) -> list[int]:
    """The lengths of caches that serve a context: a sequence takes the next one as it grows."""
    lengths = []
    length = _SHORTEST
    while length < context:
        lengths.append(length)
        length *= _GROWTH
    return [*lengths, context]
