"""Metrics as a collector receives them, against the same figures in ``/metrics``."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from server.app import create_app
from server.served_model import Wanted
from server.settings.server import Settings
from tests.conftest import Loads, wait_until
from tests.fakes import fake_checkpoint
from tests.observability.collector import Collector, attributes_of
from tests.observability.conftest import Observed
from tests.observability.test_metrics import Series
from tests.observability.test_tracing import TRACE, TRACEPARENT

BODY = {"inputs": "abc", "max_new_tokens": 3}
REQUEST_BOUNDS = [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92]


def points(metric: Any) -> list[Any]:
    return list(getattr(metric, metric.WhichOneof("data")).data_points)


def test_every_series_of_metrics_is_sent(observed: Observed) -> None:
    texts: list[str] = []

    def ask(client: TestClient) -> None:
        client.post("/generate", json=BODY)
        client.post("/generate", json={**BODY, "precision": "bf16"})
        client.post("/generate", json={**BODY, "max_new_tokens": 9999})
        texts.append(client.get("/metrics").text)

    found = observed(ask).metrics()
    scraped = Series(texts[0]).families
    with_samples = {name for name, family in scraped.items() if family.samples}
    assert {name for name in found if name.startswith("bitdial_")} == with_samples
    kinds = {"counter": "sum", "gauge": "gauge", "histogram": "histogram"}
    for name in with_samples:
        family, metric = scraped[name], found[name]
        assert metric.WhichOneof("data") == kinds[family.type], name
        assert metric.description == family.documentation
        for point in points(metric):
            _compare(point, family, attributes_of(point))
    assert found["bitdial_requests"].sum.is_monotonic
    assert found["bitdial_memory_bytes"].unit == "By"
    assert found["bitdial_queue_duration_seconds"].unit == "s"


def _compare(point: Any, family: Any, labels: dict[str, str]) -> None:
    same = [s for s in family.samples if labels.items() <= s.labels.items()]
    if family.type != "histogram":
        assert [s.value for s in same] == [point.as_double]
        return
    values = {s.name.removeprefix(family.name): s.value for s in same if "le" not in s.labels}
    assert (values["_count"], values["_sum"]) == (point.count, pytest.approx(point.sum))
    counts = [s.value for s in same if "le" in s.labels]
    assert [sum(point.bucket_counts[: i + 1]) for i in range(len(counts))] == counts
    bounds = [float(s.labels["le"]) for s in same if "le" in s.labels][:-1]
    assert list(point.explicit_bounds) == bounds


def test_the_convention_s_histograms(observed: Observed, loads: Any) -> None:
    def fail(slots: object) -> None:
        raise RuntimeError("no")

    def ask(client: TestClient) -> None:
        client.post("/generate", json=BODY)
        client.post("/generate", json={**BODY, "max_new_tokens": 1})
        loads.runners["fp32"].on_decode = fail
        client.post("/generate", json=BODY)
        client.post("/generate", json={**BODY, "max_new_tokens": 9999})  # refused: it took no time

    found = observed(ask).metrics()
    expected = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "bitdial",
        "gen_ai.request.model": "fake",
        "gen_ai.response.model": "fake",
        "bitdial.precision": "fp32",
    }
    duration = {
        attributes_of(p).get("error.type"): p for p in points(found["gen_ai.server.request.duration"])
    }
    assert {error: point.count for error, point in duration.items()} == {None: 2, "generation": 1}
    assert attributes_of(duration[None]) == expected
    assert list(duration[None].explicit_bounds) == REQUEST_BOUNDS
    (first,) = points(found["gen_ai.server.time_to_first_token"])
    (each,) = points(found["gen_ai.server.time_per_output_token"])
    assert (first.count, each.count) == (2, 1)  # of a single token, there is no time between
    assert attributes_of(first) == attributes_of(each) == expected
    (own,) = points(found["bitdial_time_to_first_token_seconds"])
    assert own.sum == pytest.approx(first.sum)
    assert all(found[name].unit == "s" for name in found if name.startswith("gen_ai."))


def test_a_chat_is_told_from_a_completion(
    make_chatty: Callable[..., TestClient], collector: Collector
) -> None:
    client = make_chatty(otlp_endpoint=collector.address)
    client.post("/generate", json=BODY)
    client.post(
        "/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    )
    client.__exit__(None, None, None)
    found = points(collector.metrics()["gen_ai.server.request.duration"])
    assert {attributes_of(point)["gen_ai.operation.name"] for point in found} == {"chat", "text_completion"}


def test_points_name_a_trace(observed: Observed) -> None:
    def ask(client: TestClient) -> None:
        client.post("/generate", json=BODY, headers=TRACEPARENT)
        client.post(
            "/generate", json=BODY, headers={"traceparent": f"00-{TRACE}-{'1' * 16}-00"}
        )  # not sampled

    found = observed(ask)
    (generation,) = found.spans("text_completion")
    for name in ("gen_ai.server.time_to_first_token", "bitdial_request_duration_seconds"):
        (point,) = points(found.metrics()[name])
        (exemplar,) = point.exemplars
        assert (exemplar.trace_id.hex(), exemplar.span_id) == (TRACE, generation.span_id)
        assert 0 < exemplar.as_double < 10


def test_figures_are_sent_at_every_interval_and_start_at_the_same_time(
    make_app: Callable[..., FastAPI], collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "100")
    with TestClient(make_app(otlp_endpoint=collector.address)) as client:
        wait_until(lambda: client.get("/health").status_code == 200)
        client.post("/generate", json=BODY)
        wait_until(lambda: "/v1/metrics" in collector.paths and "bitdial_requests" in collector.metrics())
        (before,) = points(collector.metrics()["bitdial_requests"])
        client.post("/generate", json=BODY)
        wait_until(lambda: points(collector.metrics()["bitdial_requests"])[0].as_double == 2)
        (after,) = points(collector.metrics()["bitdial_requests"])
    assert before.as_double == 1
    assert (
        before.start_time_unix_nano
        == after.start_time_unix_nano
        < before.time_unix_nano
        < after.time_unix_nano
    )
    instance = attributes_of(collector.last_metrics().resource)["service.instance.id"]
    wait_until(lambda: bool(collector.traces()))
    assert {attributes_of(one.resource)["service.instance.id"] for one in collector.traces()} == {instance}


def test_of_several_models_each_has_its_series_and_spans(
    tmp_path: Path, loads: Loads, collector: Collector
) -> None:
    settings = Settings(precisions="fp32", device="cpu", otlp_endpoint=collector.address)
    first, second = (
        Wanted(partial(fake_checkpoint, tmp_path / name), settings, name=name) for name in ("a", "b")
    )
    app = create_app(settings, first=first, others=[second], load=loads)
    with TestClient(app) as client:
        wait_until(lambda: client.get("/health").status_code == 200)
        for model in ("a", "b", "b"):
            reply = client.post("/v1/completions", json={"model": model, "prompt": "x", "max_tokens": 2})
            assert reply.status_code == 200, reply.text
    counts = {
        attributes_of(point)["gen_ai.request.model"]: point.count
        for point in points(collector.metrics()["gen_ai.server.request.duration"])
    }
    assert counts == {"a": 1, "b": 2}
    own = {attributes_of(p)["model"]: p.as_double for p in points(collector.metrics()["bitdial_requests"])}
    assert own == {"a": 1, "b": 2}
    assert len(collector.spans("text_completion a")) == 1
    assert len(collector.spans("text_completion b")) == 2
