"""HEAD on every GET route, with the same key; and the ``Allow`` of a 405."""

from collections.abc import Callable

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from tests.http.connection.test_framing import LAST, LIVE, statuses
from tests.http.connection.test_slow_clients import connected, received
from tests.http.test_http_robustness import PUBLIC, all_routes

VARYING = {"/stats", "/metrics"}  # two responses differ
FILLED = {"{model_id}": "fake", "{model}": "fake", "{name}": "fp32", "{id}": "fake"}


def gettable(client: TestClient) -> list[str]:
    paths = [path for method, path in all_routes(client) if method == "GET" and path != "/nothing"]
    for name, value in FILLED.items():
        paths = [path.replace(name, value) for path in paths]
    return [*paths, "/docs/static/swagger-ui.css"]


def test_head_answers_as_get_without_the_body(client: TestClient) -> None:
    paths = gettable(client)
    assert len(paths) > 12
    for path in paths:
        got, head = client.get(path), client.head(path)
        assert head.status_code == got.status_code, path
        assert head.content == b""
        assert set(head.headers) == set(got.headers), path
        if path not in VARYING:
            assert head.headers["content-length"] == got.headers["content-length"], path
    assert client.head("/nothing").status_code == 404


def test_head_needs_the_key_that_get_needs(make_client: Callable[..., TestClient]) -> None:
    client = make_client(api_key="right")
    public = {path.replace("{model}", "fake") for path in PUBLIC}
    for path in gettable(client):
        assert client.head(path).status_code == (200 if path in public else 401), path
        right = client.head(path, headers={"Authorization": "Bearer right"}).status_code
        assert right == client.get(path, headers={"Authorization": "Bearer right"}).status_code


def test_on_the_wire_nothing_follows_the_headers(live: str) -> None:
    head = LIVE.replace(b"GET", b"HEAD")
    with connected(live) as connection:
        connection.sendall(head * 2 + head.replace(b"/live", b"/none") + LAST)
        said = received(connection)
    assert statuses(said) == [200, 200, 404, 200]
    assert said.count(b"{") == 1


def test_head_is_in_no_document(make_app: Callable[..., FastAPI]) -> None:
    assert not [path for path, methods in make_app().openapi()["paths"].items() if "head" in methods]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/report", "GET, HEAD, POST"),
        ("POST", "/stats", "GET, HEAD"),
        ("OPTIONS", "/stats", "GET, HEAD"),
        ("DELETE", "/health/live", "GET, HEAD"),
        ("GET", "/generate", "POST"),
        ("HEAD", "/generate", "POST"),
        ("GET", "/models/fake/generate", "POST"),
        ("POST", "/v1/models/fake", "GET, HEAD"),
        ("GET", "/precisions/fp32/load", "POST"),
        ("POST", "/docs", "GET, HEAD"),
        ("PUT", "/docs/static/swagger-ui.css", "GET, HEAD"),
        ("PUT", "/openapi.json", "GET, HEAD"),
    ],
)
def test_a_405_lists_the_allowed_methods(client: TestClient, method: str, path: str, allowed: str) -> None:
    reply = client.request(method, path)
    assert reply.status_code == 405
    assert reply.headers["allow"] == allowed
