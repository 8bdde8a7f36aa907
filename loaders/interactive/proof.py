"""The proof of a loaded model for a person: one line of text, and tables for a notebook."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from loaders.base import LoadedModel
from loaders.layer_errors import layers_of

_NUMBER = re.compile(r"\b\d+\b")


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one name in every block, in one format.

    Args:
        name: with the blocks' numbers as a range, such as ``transformer.h.0–4.attn.c_attn``.
        count: the number of layers.
        format: of their weights; ``unknown`` if the runner doesn't describe its layers or is closed.
        bits_per_weight: scales and tables included; None if unknown.
        reason: why they were not quantized; None for quantized ones.
    """

    name: str
    count: int
    format: str
    bits_per_weight: float | None
    reason: str | None


def line(model: LoadedModel) -> str:
    """One line: precision, model, bytes, bits per weight, quantized and kept layers, kernels."""
    footprint = model.footprint
    name = f" of {model.spec.checkpoint.model_id}" if model.spec is not None else ""
    kernels = f", kernels: {model.details['kernels']}" if "kernels" in model.details else ""
    return (
        f"<LoadedModel {model.precision}{name}: {_size(footprint.weights_bytes)}, "
        f"{footprint.bits_per_weight:.2f} bits per weight, {len(footprint.quantized)} layers quantized, "
        f"{len(footprint.kept)} kept{kernels}>"
    )


def as_html(model: LoadedModel) -> str:
    """Tables: the facts, bytes by type, and the layers; every text is escaped."""
    footprint = model.footprint
    facts = {
        "model": "unknown" if model.spec is None else model.spec.checkpoint.model_id,
        "weights": f"{_size(footprint.weights_bytes)}, {footprint.bits_per_weight:.2f} bits per weight",
        "parameters": f"{footprint.parameters:,}",
        "quantized": f"{footprint.quantized_share:.1%} of the weights in matrix products",
        "loaded in": f"{model.load_seconds:.2f} s",
        **{name.replace("_", " "): value for name, value in model.details.items() if _is_plain(value)},
    }
    of_types = sorted(footprint.by_dtype.items(), key=lambda item: -item[1])
    state = footprint.quantization_state.items()
    of_roles = [(f"of these, {role.replace('_', ' ')}", size) for role, size in state if size]
    sizes = [
        (name, f"{size:,}", f"{size / max(1, footprint.weights_bytes):.1%}")
        for name, size in (*of_types, *of_roles)
    ]
    layers = [
        (
            group.name,
            str(group.count),
            group.format,
            "" if group.bits_per_weight is None else f"{group.bits_per_weight:.2f}",
            group.reason or "quantized",
        )
        for group in groups(model)
    ]
    return (
        f"<div><strong>{escape(model.precision)}</strong>"
        + _table(("", ""), facts.items())
        + _table(("type", "bytes", "share"), sizes)
        + _table(("layers", "number", "format", "bits per weight", "quantized, or kept because"), layers)
        + "</div>"
    )


def groups(model: LoadedModel) -> list[LayerGroup]:
    """The model's layers, those of equal blocks as one; quantized ones first."""
    described = _described(model)
    found: dict[tuple[str, str, str | None], list[tuple[str, float | None]]] = defaultdict(list)
    for name, reason in _names(model):
        format_, bits = described.get(name, ("unknown", None))
        found[_NUMBER.sub("*", name), format_, reason].append((name, bits))
    return [
        LayerGroup(_range([name for name, _ in layers]), len(layers), format_, _mean(layers), reason)
        for (_, format_, reason), layers in found.items()
    ]


def _names(model: LoadedModel) -> Iterator[tuple[str, str | None]]:
    yield from ((name, None) for name in model.footprint.quantized)
    yield from ((layer.name, layer.reason) for layer in model.footprint.kept)


def _described(model: LoadedModel) -> Mapping[str, tuple[str, float]]:
    """(format, bits per weight) of each layer, as far as the runner describes it."""
    wanted = [name for name, _ in _names(model)]
    try:
        layers = layers_of(model.runner) or {}
        weights = {name: layers[name][1] for name in wanted if name in layers}
    except RuntimeError:  # the runner is closed: a notebook may still show the model
        return {}
    return {name: (one.format, one.bits_per_weight) for name, one in weights.items()}


def _mean(layers: Sequence[tuple[str, float | None]]) -> float | None:
    known = [bits for _, bits in layers if bits is not None]
    return sum(known) / len(known) if known else None


def _range(names: Sequence[str]) -> str:
    """The names as one: each number that differs as ``first–last`` or, with gaps, as a list."""
    columns = zip(*([int(number) for number in _NUMBER.findall(name)] for name in names), strict=True)
    shown = iter([_span(sorted(set(column))) for column in columns])
    return _NUMBER.sub(lambda _: next(shown), names[0])


def _span(numbers: Sequence[int]) -> str:
    if len(numbers) > 1 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]}–{numbers[-1]}"
    return ",".join(map(str, numbers))


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)


def _size(bytes_: int) -> str:
    return f"{bytes_ / 1e6:,.1f} MB" if bytes_ >= 1e5 else f"{bytes_:,} bytes"


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    head = f"<thead>{_row('th', heads)}</thead>" if any(heads) else ""
    return f"<table>{head}<tbody>{''.join(_row('td', row) for row in rows)}</tbody></table>"


def _row(cell: str, values: Sequence[object]) -> str:
    return "<tr>" + "".join(f"<{cell}>{escape(str(value))}</{cell}>" for value in values) + "</tr>"
