"""Apps that send telemetry to a collector of the test."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from tests.conftest import wait_until
from tests.observability.collector import Collector

Observed = Callable[..., Collector]


@pytest.fixture
def collector() -> Iterator[Collector]:
    one = Collector()
    yield one
    one.close()


@pytest.fixture
def observed(make_app: Callable[..., FastAPI], collector: Collector) -> Observed:
    """Sends requests to a ready app; returns the collector after the app has stopped."""

    def ask(ask_it: Callable[[TestClient], object], path: str = "", **settings: Any) -> Collector:
        app = make_app(otlp_endpoint=collector.address + path, **settings)
        with TestClient(app, raise_server_exceptions=False) as client:
            wait_until(lambda: client.get("/health").status_code == 200)
            ask_it(client)
        return collector

    return ask
