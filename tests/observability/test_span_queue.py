"""Spans that the full queue drops are counted in the log, and the line does not come too often."""

import logging
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from server.observability.otlp import span_queue
from server.observability.otlp.span_queue import Dropped
from tests.conftest import wait_until
from tests.observability.collector import Collector

BODY = {"inputs": "abc", "max_new_tokens": 2}
SPANS = 5  # of a request: itself, its generation, and queue, prefill and decode in it


def dropped(log: pytest.LogCaptureFixture) -> list[int]:
    """The numbers in the lines, in their order."""
    return [int(count) for count in re.findall(r"(\d+) spans dropped", log.text)]


def serve(make_app: Callable[..., FastAPI], collector: Collector, requests: int, **settings: Any) -> None:
    with TestClient(make_app(otlp_endpoint=collector.address, **settings)) as client:
        wait_until(lambda: client.get("/health").status_code == 200)
        for _ in range(requests):
            assert client.post("/generate", json=BODY).status_code == 200
    collector.close()


def test_what_did_not_arrive_is_what_the_log_says_was_dropped(
    make_app: Callable[..., FastAPI], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_on")
    collector = Collector(seconds=0.3)
    serve(make_app, collector, 20)
    lost = 20 * SPANS - len(collector.spans())
    assert lost > 20
    # a batch of 8 that has left the queue and is not counted as out yet may hide so many
    assert lost - 8 <= sum(dropped(caplog)) <= lost + 8
    assert len(dropped(caplog)) <= 2  # one at once, one for the rest at the end
    assert "8 already waited (OTEL_BSP_MAX_QUEUE_SIZE); requests are not affected" in caplog.text


@pytest.mark.parametrize("sampler", ["always_on", "always_off"])
def test_nothing_is_logged_where_all_arrive_or_none_is_sampled(
    make_app: Callable[..., FastAPI],
    sampler: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    if sampler == "always_off":
        monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "1")
    collector = Collector()
    serve(make_app, collector, 4)
    assert len(collector.spans()) == (4 * SPANS if sampler == "always_on" else 0)
    assert dropped(caplog) == []


def test_a_line_a_minute_has_the_number_since_the_line_before(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(span_queue, "time", SimpleNamespace(monotonic=lambda: now))
    noted = Dropped(2)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            noted.note_in()
        noted.log()
        assert dropped(caplog) == []  # they wait
        for _ in range(3):
            noted.note_in()
        noted.log()
        noted.note_in()
        noted.log()
        now += 59
        noted.log()
        assert dropped(caplog) == [3]
        now += 1
        noted.log()
        noted.log()
        assert dropped(caplog) == [3, 1]
        noted.note_out(2)
        for _ in range(4):
            noted.note_in()
        noted.log()
        noted.log(last=True)
        noted.log(last=True)
    assert dropped(caplog) == [3, 1, 2]
