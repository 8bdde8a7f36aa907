"""Clients of an app with two models."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.conftest import wait_until
from tests.two_models import Runners, is_ready, two_models

Make = Callable[..., TestClient]
BODY = {"inputs": "x", "max_new_tokens": 3}


@pytest.fixture
def runners() -> Runners:
    return {}


@pytest.fixture
def make(tmp_path: Path, runners: Runners) -> Iterator[Make]:
    """Creates clients of ready apps with two models."""
    clients: list[TestClient] = []

    def make(**values: Any) -> TestClient:
        client = TestClient(app := two_models(tmp_path, runners, **values))
        client.__enter__()
        clients.append(client)
        wait_until(lambda: is_ready(app))
        return client

    yield make
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture
def client(make: Make) -> TestClient:
    return make()
