"""``/metrics`` after traffic of known size: every series, its labels, and the exact counts."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

import loaders
from server.engine.sequence import StepStats, Timeline
from server.observability.ended import Ended
from server.observability.metrics import Metrics
from tests.conftest import Loads, entered, until
from tests.http.test_overload import Gate

MakeApp = Callable[..., FastAPI]
TYPES = {
    "requests": "counter",
    "generated_tokens": "counter",
    "prompt_tokens": "counter",
    "request_duration_seconds": "histogram",
    "queue_duration_seconds": "histogram",
    "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram",
    "batch_size": "histogram",
    "requests_running": "gauge",
    "requests_waiting": "gauge",
    "memory_bytes": "gauge",
    "load_seconds": "gauge",
    "kv_cache_usage": "gauge",
    "prefix_cache_queries": "counter",
    "prefix_cache_hits": "counter",
    "preemptions": "counter",
    "shadow_requests": "counter",
    "shadow_kl": "histogram",
    "shadow_agreement": "histogram",
}
LATENCIES = ["request_duration_seconds", "queue_duration_seconds", "time_to_first_token_seconds"]


class Series:
    """A scrape, parsed by Prometheus's own parser."""

    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self.samples = [sample for family in self.families.values() for sample in family.samples]

    def value(self, name: str, precision: str = "fp32", **labels: str) -> float:
        """The sum of the samples with these labels."""
        wanted = {"precision": precision, **labels}
        found = [
            s for s in self.samples if s.name == f"bitdial_{name}" and wanted.items() <= s.labels.items()
        ]
        return sum(sample.value for sample in found)

    def outcomes(self, precision: str = "fp32") -> dict[str, float]:
        found = self.families["bitdial_requests"].samples
        return {
            s.labels["outcome"]: s.value
            for s in found
            if s.name.endswith("_total") and s.labels["precision"] == precision
        }


def scrape(client: TestClient) -> Series:
    reply = client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    return Series(reply.text)


async def scraped(client: httpx.AsyncClient) -> Series:
    return Series((await client.get("/metrics")).text)


def test_every_family_has_its_type_and_labels(client: TestClient) -> None:
    client.post("/generate", json={"inputs": "abc", "max_new_tokens": 3})
    families = scrape(client).families
    assert {name.removeprefix("bitdial_"): family.type for name, family in families.items()} == TYPES
    extra = {"requests": {"outcome"}, "shadow_requests": {"outcome"}, "memory_bytes": {"kind"}}
    for name, family in families.items():
        assert family.documentation
        for sample in family.samples:
            expected = {"model", "precision"} | extra.get(name.removeprefix("bitdial_"), set())
            assert set(sample.labels) - {"le"} == expected
            assert sample.labels["model"] == "fake"
    kinds = {s.labels["kind"] for s in families["bitdial_memory_bytes"].samples}
    assert kinds == {"weights", "kv_cache", "working"}


def test_counts_are_exact(client: TestClient) -> None:
    for count in (1, 3, 6):
        client.post("/generate", json={"inputs": "abcd", "max_new_tokens": count})
    client.post("/generate_stream", json={"inputs": "abc", "max_new_tokens": 4})
    client.post("/v1/completions", json={"prompt": ["a", "bb"], "max_tokens": 2, "precision": "bf16"})
    series = scrape(client)
    assert series.outcomes() == {"success": 4}
    assert series.outcomes("bf16") == {"success": 2}
    assert series.value("generated_tokens_total") == 1 + 3 + 6 + 4
    assert series.value("prompt_tokens_total") == 3 * 4 + 3
    assert series.value("generated_tokens_total", "bf16") == 4
    assert series.value("prompt_tokens_total", "bf16") == 3
    for name in LATENCIES:
        assert series.value(f"{name}_count") == 4
        assert series.value(f"{name}_bucket", le="+Inf") == 4
        assert series.value(f"{name}_sum") > 0
        assert series.value(f"{name}_count", "bf16") == 2
    assert series.value("inter_token_latency_seconds_count") == 0 + 2 + 5 + 3
    assert series.value("batch_size_count") == 0 + 2 + 5 + 3  # one row at a time here: one step per token
    assert series.value("batch_size_sum") == 10
    assert series.value("requests_running") == series.value("requests_waiting") == 0


def test_what_this_host_cannot_run_is_an_outcome_of_its_own(
    make_client: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loaders.precisions.bnb.find_spec", lambda name: None)
    client = make_client()
    reply = client.post("/generate", json={"inputs": "abc", "precision": "nf4"})
    assert (reply.status_code, reply.json()["error_type"]) == (409, "unavailable")
    answered = {"inputs": "abc", "precision": "nf4", "fallback": True, "max_new_tokens": 1}
    assert client.post("/generate", json=answered).status_code == 200
    series = scrape(client)
    assert series.outcomes("nf4") == {"unsupported": 1}
    assert series.outcomes() == {"success": 1}


def test_outcomes(make_client: Callable[..., TestClient], loads: Loads) -> None:
    client = make_client(max_concurrent_requests=1)
    client.post("/generate", json={"inputs": "abc", "max_new_tokens": 1})
    client.post("/generate", json={"inputs": "abc", "best_of": 2, "do_sample": True})
    client.post("/generate", json={"inputs": "abc", "max_new_tokens": 1000})
    client.post("/generate", json={"inputs": "abc", "precision": "int3"})
    loads.runners["fp32"].on_prefill = fail
    client.post("/generate", json={"inputs": "abc"})
    series = scrape(client)
    assert series.outcomes() == {"success": 1, "overloaded": 2, "validation": 1, "generation": 1}
    assert {sample.labels["precision"] for sample in series.samples} == set(loaders.PRECISIONS)
    for name in LATENCIES:
        assert series.value(f"{name}_count") == 1, "only what succeeded has a latency worth telling"


def fail(slot: int, ids: object) -> None:
    raise RuntimeError


def test_gauges_rise_and_return_to_zero(make_app: MakeApp, loads: Loads) -> None:
    async def main() -> None:
        async with entered(app) as client:
            gate = Gate(loads.runners["fp32"])
            body = {"inputs": "abc", "max_new_tokens": 3}
            tasks = [asyncio.create_task(client.post("/generate", json=body)) for _ in range(5)]
            await until(lambda: app.state.service.places.in_flight == 5 and gate.prompts)
            busy = await scraped(client)
            assert busy.value("requests_running") + busy.value("requests_waiting") == 5
            assert 1 <= busy.value("requests_running") <= 2
            assert busy.value("requests_waiting", "bf16") == 0
            gate.opened.set()
            await asyncio.gather(*tasks)
            idle = await scraped(client)
            assert idle.value("requests_running") == idle.value("requests_waiting") == 0
            assert idle.outcomes() == {"success": 5}
            assert idle.value("batch_size_sum") == 5 * 2

    app = make_app(max_batch_size=2)
    asyncio.run(main())


def test_an_unloaded_precision_has_no_memory(make_app: MakeApp, loads: Loads) -> None:
    async def main() -> None:
        async with entered(app) as client:
            before = await scraped(client)
            assert before.value("memory_bytes", kind="weights") == 4000
            runner = loads.runners["fp32"]
            assert before.value("memory_bytes", kind="kv_cache") == runner.kv_cache_bytes
            assert before.value("load_seconds") == pytest.approx(0.01)
            gate = Gate(runner)
            task = asyncio.create_task(client.post("/generate", json={"inputs": "abc"}))
            await until(lambda: gate.prompts)
            assert (await scraped(client)).value("requests_running") == 1
            unloading = asyncio.create_task(client.post("/precisions/fp32/unload"))
            assert (await task).status_code == 424
            gate.opened.set()
            await unloading
            after = await scraped(client)
            assert after.value("memory_bytes") == after.value("requests_running") == 0
            assert after.value("memory_bytes", "bf16", kind="weights") == 4000

    app = make_app()
    asyncio.run(main())


def test_percentiles_are_by_nearest_rank() -> None:
    metrics = Metrics("m")
    for milliseconds in range(1, 101):
        line = Timeline(arrived=0.0, admitted=0.0, first_token=milliseconds / 1000, last_token=0.2, tokens=2)
        metrics.observe_request(Ended(precision="fp32", outcome="success", timeline=line))
    latency: Any = metrics.latency("fp32")
    assert latency["requests"] == 100
    assert latency["ttft_ms"] == {"p50": 50, "p90": 90, "p99": 99, "mean": 50.5}
    assert latency["total_ms"]["p50"] == 200
    assert latency["inter_token_ms"] == {"p50": None, "p90": None, "p99": None, "mean": None}


def test_throughput_is_tokens_by_computing_time() -> None:
    metrics = Metrics("m")
    assert metrics.throughput("fp32") == {"generated_tokens": 0, "tokens_per_second": None}
    metrics.observe_step("fp32", StepStats(4, 0, 4, 0.5, (0.5,) * 4))
    metrics.observe_step("fp32", StepStats(0, 9, 0, 0.5))
    assert metrics.throughput("fp32") == {"generated_tokens": 4, "tokens_per_second": 4.0}


def test_no_name_that_a_client_sends_becomes_a_label(client: TestClient) -> None:
    rude = ['int3"} 1\n', "x" * 10_000, "int8\n# EOF", "é\u2028", "../fp32"]
    for name in rude:
        bodies = ({"inputs": "a", "precision": name}, {"inputs": "a", "parameters": {"precision": name}})
        for body in bodies:
            assert client.post("/generate", json=body).status_code == 422
        for model in (name, f"fake:{name}"):
            reply = client.post("/v1/completions", json={"prompt": "a", "model": model})
            assert reply.status_code in (400, 404)
        client.post("/generate", json={"inputs": "a"}, params={"precision": name})
    samples = scrape(client).samples
    assert {sample.labels["model"] for sample in samples} == {"fake"}
    assert {sample.labels["precision"] for sample in samples} <= {*loaders.PRECISIONS, "unread"}
