"""The access log: one line per request, with the reason of a refusal, and none for periodic probes."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from starlette.testclient import TestClient

from server.observability.logs import JsonFormatter, set_up_logging

MakeClient = Callable[..., TestClient]


@contextmanager
def logging_restored() -> Iterator[None]:
    root, own = logging.getLogger(), [logging.getLogger(name) for name in ("server", "loaders")]
    before = (root.handlers[:], root.level, [one.level for one in own])
    try:
        yield
    finally:
        root.handlers[:], root.level = before[0], before[1]
        for one, level in zip(own, before[2], strict=True):
            one.setLevel(level)


def access_lines(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == "server.access"]


def test_a_refusal_has_its_reason(make_client: MakeClient, caplog: pytest.LogCaptureFixture) -> None:
    client = make_client(api_key="secret")
    with caplog.at_level(logging.INFO, "server.access"):
        client.post("/generate", json={"inputs": "a"})
        client.post(
            "/generate", json={"inputs": "a", "odd\nline": 1}, headers={"Authorization": "Bearer secret"}
        )
    no_key, odd = (record.getMessage() for record in access_lines(caplog))
    assert ' POST "/generate" 401 ' in no_key
    assert "(unauthorized: a valid key is needed" in no_key
    assert "(validation: unknown field" in odd
    assert "\n" not in odd


def test_json_has_the_parts_by_name(make_client: MakeClient, caplog: pytest.LogCaptureFixture) -> None:
    client = make_client()
    with caplog.at_level(logging.INFO, "server.access"):
        client.get("/nowhere?x=1", headers={"X-Request-ID": "mine"})
        client.get("/precisions")
    refused, served = (json.loads(JsonFormatter().format(record)) for record in access_lines(caplog))
    assert refused["request_id"] == "mine"
    assert (refused["method"], refused["path"], refused["status"]) == ("GET", "/nowhere", 404)
    assert refused["reason"] == "not_found: no such route here"
    assert refused["duration_ms"] > 0
    assert served["status"] == 200
    assert "reason" not in served


def test_health_and_metrics_are_quiet_unless_debugging(
    make_client: MakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    client = make_client()
    with caplog.at_level(logging.INFO, "server.access"):
        for path in ("/health/live", "/health", "/metrics"):
            assert client.get(path).status_code == 200
        assert access_lines(caplog) == []
        client.post("/health")
        assert len(access_lines(caplog)) == 1, "what is refused is shown"
    with caplog.at_level(logging.DEBUG, "server.access"):
        client.get("/metrics")
    assert len(access_lines(caplog)) == 2


@pytest.mark.parametrize(("level", "own", "others"), [("debug", 10, 30), ("info", 20, 30), ("error", 40, 40)])
def test_the_level_that_is_set(level: str, own: int, others: int) -> None:
    with logging_restored():
        set_up_logging(json_output=False, level=level)
        assert logging.getLogger("server.access").getEffectiveLevel() == own
        assert logging.getLogger("transformers_or_any").getEffectiveLevel() == others


def test_the_icon_that_browsers_request(make_client: MakeClient) -> None:
    reply = make_client(api_key="secret").get("/favicon.ico")
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "image/svg+xml"
    assert reply.text.startswith("<svg")
