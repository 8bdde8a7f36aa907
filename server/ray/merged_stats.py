"""``/stats`` of several replicas as one: bytes and counts summed, percentiles over the values of all."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from server.observability.metrics import Metrics
from server.ray.replica import Figures
from server.routes.stats import speed_of

_SAME = frozenset({"bits_per_weight", "ratio_to_fp32", "block_bytes"})
"""Equal in all replicas of a precision."""


def merged_stats(parts: Mapping[str, Sequence[Figures]]) -> dict[str, Any]:
    """One reply of those of all replicas, by deployment; the first deployment's model, host and report."""
    bodies = {name: [json.loads(one.answer.body) for one in figures] for name, figures in parts.items()}
    every = [body for found in bodies.values() for body in found]
    first = every[0]
    pooled = Metrics(first["model"]["id"])
    for figures in parts.values():
        for one in figures:
            pooled.absorb(one.records)
    parameters = next((body["model"]["parameters"] for body in every if body["model"]["parameters"]), None)
    return {
        **first,
        "model": {**first["model"], "parameters": parameters},
        "replicas": {name: len(found) for name, found in bodies.items()},
        "queue": summed([body["queue"] for body in every]),
        "memory": summed([body["memory"] for body in every]),
        "kv_cache": summed([body["kv_cache"] for body in every]),
        "precisions": {name: _precision(name, bodies, pooled) for name in first["precisions"]},
    }


def _precision(name: str, bodies: Mapping[str, Sequence[dict[str, Any]]], pooled: Metrics) -> dict[str, Any]:
    own = [body["precisions"][name] for body in bodies.get(name, ())]
    others = [body["precisions"][name] for found in bodies.values() for body in found]
    loaded = [entry for entry in [*own, *others] if entry["state"] == "loaded"]
    loaded = [entry for i, entry in enumerate(loaded) if not any(entry is seen for seen in loaded[:i])]
    ratio, interval, note = speed_of(pooled, name)
    return {
        **(loaded or own or others)[0],
        "memory": summed([entry["memory"] for entry in loaded]) if loaded else None,
        "kv_cache": _blocks([entry["kv_cache"] for entry in loaded]),
        "load_seconds": max((entry["load_seconds"] for entry in loaded), default=None),
        "latency": pooled.latency(name),
        "throughput": pooled.throughput(name),
        "speed_ratio_to_fp32": ratio,
        "speed_ratio_range": interval,
        "note": note,
    }


def _blocks(caches: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    known = [cache for cache in caches if cache is not None]
    if not known:
        return None
    total = summed(known)
    usage = total["used_blocks"] / total["blocks"] if total["blocks"] else 0.0
    hits = total["hit_tokens"] / total["queried_tokens"] if total["queried_tokens"] else 0.0
    return {**total, "usage": round(usage, 4), "hit_rate": round(hits, 4)}


def summed(values: Sequence[Any]) -> Any:
    """Numbers added, objects field by field; None where one is None, and of everything else the first."""
    first = values[0]
    if any(value is None for value in values):
        return None
    if isinstance(first, dict):
        names = dict.fromkeys(name for value in values for name in value)
        return {name: _field(name, [value[name] for value in values if name in value]) for name in names}
    return sum(values) if isinstance(first, int | float) and not isinstance(first, bool) else first


def _field(name: str, values: Sequence[Any]) -> Any:
    return values[0] if name in _SAME else summed(values)
