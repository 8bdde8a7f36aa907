"""Figures of several replicas as one."""

import json
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'bitdial[ray]'")
from server.observability.exposition import expose
from server.observability.metrics import Metrics
from server.observability.record import Record
from server.ray.exchange import Whole
from server.ray.merged_metrics import MergedMetrics
from server.ray.merged_stats import merged_stats, summed
from server.ray.replica import Figures


def page(requests: float, usage: float = 0.0, load: float = 0.0) -> str:
    return (
        "# HELP bitdial_requests_total Requests ended, by outcome\n"
        "# TYPE bitdial_requests_total counter\n"
        f'bitdial_requests_total{{model="a b",outcome="success",precision="fp32"}} {requests}\n'
        "# HELP bitdial_kv_cache_usage Share\n# TYPE bitdial_kv_cache_usage gauge\n"
        f'bitdial_kv_cache_usage{{precision="fp32"}} {usage}\n'
        "# HELP bitdial_load_seconds Seconds\n# TYPE bitdial_load_seconds gauge\n"
        f'bitdial_load_seconds{{precision="fp32"}} {load}\n'
    )


def test_counters_are_sums_shares_means_and_load_times_the_longest() -> None:
    text = MergedMetrics().merged({"a": page(3, 0.5, 2), "b": page(4, 0.1, 7)})
    assert text == page(7.0, 0.3, 7.0)


def test_what_a_replica_has_counted_stays_after_its_end() -> None:
    merged = MergedMetrics()
    merged.merged({"a": page(3), "b": page(4)})
    assert page(6.0)[:170] == merged.merged({"a": page(2)})[:170]
    assert page(8.0)[:170] == merged.merged({"a": page(2), "c": page(2)})[:170]


def test_a_replica_that_misses_a_scrape_is_not_counted_twice() -> None:
    merged = MergedMetrics()
    for pages in ({"a": 3, "b": 4}, {"a": 3}, {}, {"a": 3, "b": 4}):
        text = merged.merged({name: page(requests) for name, requests in pages.items()})
    assert text == page(7.0, 0.0, 0.0)


def test_what_many_ended_replicas_have_counted_is_kept() -> None:
    merged = MergedMetrics()
    for number in range(200):
        text = merged.merged({str(number): page(1)})
    assert text == page(200.0, 0.0, 0.0)


def test_the_metrics_of_one_replica_are_unchanged() -> None:
    metrics = Metrics("model")
    metrics.set_load("fp32", 1, 2)
    text = expose([metrics], "").body.decode()
    assert MergedMetrics().merged({"a": text}) == text


def test_objects_are_summed_field_by_field() -> None:
    one = {"bytes": 2, "by_dtype": {"int8": 1}, "limit": None, "bits_per_weight": 8.0, "name": "x"}
    two = {"bytes": 3, "by_dtype": {"int8": 1, "float32": 4}, "limit": 7, "bits_per_weight": 8.0, "name": "x"}
    assert summed([one, two]) == {
        "bytes": 5,
        "by_dtype": {"int8": 2, "float32": 4},
        "limit": None,
        "bits_per_weight": 8.0,
        "name": "x",
    }


def figures(own: str, gaps: list[float], queried: int) -> Figures:
    def precision(name: str) -> dict[str, Any]:
        if name != own:
            empty: dict[str, Any] = dict.fromkeys(("memory", "kv_cache", "load_seconds"))
            return {"state": "unloaded", **empty}
        cache = {"blocks": 4, "block_bytes": 10, "used_blocks": 1, "queried_tokens": queried, "hit_tokens": 1}
        return {"state": "loaded", "memory": {"total_bytes": 5}, "kv_cache": cache, "load_seconds": 1.0}

    body = {
        "model": {"id": "m", "parameters": 1},
        "queue": {"running": 1, "capacity": 8},
        "memory": {"limit_bytes": None, "used_bytes": 2},
        "kv_cache": {"used_bytes": 1},
        "precisions": {name: precision(name) for name in ("fp32", "nf4")},
    }
    record = Record(requests=1, tokens=len(gaps), busy=sum(gaps))
    record.gaps.extend(gaps)
    record.single_row_gaps.extend(gaps)
    return Figures(Whole(200, [], json.dumps(body).encode()), {own: record})


def test_stats_have_every_replica() -> None:
    parts = {
        "fp32": [figures("fp32", [0.010] * 8, 3), figures("fp32", [0.030] * 8, 1)],
        "nf4": [figures("nf4", [0.005] * 8, 1)],
    }
    stats = merged_stats(parts)
    assert stats["replicas"] == {"fp32": 2, "nf4": 1}
    assert stats["queue"] == {"running": 3, "capacity": 24}
    assert stats["memory"] == {"limit_bytes": None, "used_bytes": 6}
    full, quantized = stats["precisions"]["fp32"], stats["precisions"]["nf4"]
    assert full["memory"] == {"total_bytes": 10}
    assert full["kv_cache"]["usage"] == 0.25
    assert full["kv_cache"]["hit_rate"] == 0.5
    assert full["kv_cache"]["block_bytes"] == 10
    assert full["latency"]["requests"] == 2
    # over the values of both, where a mean of two medians would be 20
    assert full["latency"]["inter_token_ms"]["p50"] == 10.0
    assert full["latency"]["inter_token_ms"]["p90"] == 30.0
    assert full["throughput"]["generated_tokens"] == 16
    assert quantized["speed_ratio_to_fp32"] == 4.0
