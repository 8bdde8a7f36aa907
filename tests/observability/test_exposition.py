"""``/metrics`` in the format that its reader prefers; exemplars in OpenMetrics alone."""

from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from server.observability.exposition import prefers_openmetrics
from tests.observability.collector import Collector
from tests.observability.test_metrics import LATENCIES, TYPES
from tests.observability.test_tracing import TRACE, TRACEPARENT

OPENMETRICS = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"}
BODY = {"inputs": "abc", "max_new_tokens": 3}


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain", False),
        ("application/openmetrics-text", True),
        ("application/openmetrics-text; version=0.0.1; q=0.4, text/plain; q=0.2", True),
        ("application/openmetrics-text;q=0.2,text/plain;q=0.4", False),
        ("application/openmetrics-text;q=0", False),
        ("Application/OpenMetrics-Text ; Q=1", True),
        ("application/openmetrics-text;q=high", False),
        (";;,,q=1", False),
    ],
)
def test_openmetrics_is_for_those_who_ask(accept: str, expected: bool) -> None:
    assert prefers_openmetrics(accept) is expected


def parsed(text: str) -> list[Any]:
    """The families, by the parser of OpenMetrics, which is strict."""
    return list(text_string_to_metric_families(text))  # type: ignore[no-untyped-call]


def exemplars(text: str) -> dict[str, Any]:
    return {s.name: s.exemplar for f in parsed(text) for s in f.samples if s.exemplar is not None}


def test_openmetrics_has_the_same_series(client: TestClient) -> None:
    client.post("/generate", json=BODY)
    plain, open_ = client.get("/metrics"), client.get("/metrics", headers=OPENMETRICS)
    assert plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert open_.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert plain.headers["vary"] == open_.headers["vary"] == "Accept"
    assert open_.text.endswith("# EOF\n")
    families = {family.name: family.type for family in parsed(open_.text)}
    assert {name.removeprefix("bitdial_"): kind for name, kind in families.items()} == TYPES
    lines = [line for line in plain.text.splitlines() if not line.startswith("#")]
    assert lines == [line for line in open_.text.splitlines() if not line.startswith("#")]
    assert exemplars(open_.text) == {}  # nothing was traced


def test_a_traced_request_is_the_example_of_its_latency(
    make_client: Callable[..., TestClient], collector: Collector
) -> None:
    client = make_client(otlp_endpoint=collector.address)
    client.post("/generate", json=BODY, headers=TRACEPARENT)
    client.post(
        "/generate", json=BODY, headers={"traceparent": f"00-{'2' * 32}-{'1' * 16}-00"}
    )  # not sampled
    text = client.get("/metrics", headers=OPENMETRICS).text
    found = exemplars(text)
    assert set(found) == {f"bitdial_{name}_bucket" for name in LATENCIES}
    assert {exemplar.labels["trace_id"] for exemplar in found.values()} == {TRACE}
    assert "trace_id" not in client.get("/metrics").text
    client.__exit__(None, None, None)
    (generation,) = collector.spans("text_completion")
    assert {exemplar.labels["span_id"] for exemplar in found.values()} == {generation.span_id.hex()}
