"""What routes declare of themselves, and how a request finds it before the router has run."""

from collections.abc import Callable
from typing import Any

import pytest
from fastapi.routing import APIRoute
from starlette.testclient import TestClient

from server.app import ROUTES
from server.http.route_facts import Dialect, RouteFacts, RouteTable, declared

MakeClient = Callable[..., TestClient]
GENERATES, OPENAI, CHAT = {"takes_a_place", "generates"}, Dialect.OPENAI, Dialect.OPENAI_CHAT
EXPECTED: dict[tuple[str, str], tuple[set[str], Dialect]] = {
    ("POST", "/"): (GENERATES, Dialect.NATIVE),
    ("POST", "/generate"): (GENERATES, Dialect.NATIVE),
    ("POST", "/generate_stream"): (GENERATES, Dialect.NATIVE),
    ("POST", "/models/{model}"): (GENERATES, Dialect.NATIVE),
    ("POST", "/models/{model}/generate"): (GENERATES, Dialect.NATIVE),
    ("POST", "/models/{model}/generate_stream"): (GENERATES, Dialect.NATIVE),
    ("POST", "/v1/completions"): (GENERATES, OPENAI),
    ("POST", "/v1/chat/completions"): (GENERATES, CHAT),
    ("POST", "/models/{model}/v1/completions"): (GENERATES, OPENAI),
    ("POST", "/models/{model}/v1/chat/completions"): (GENERATES, CHAT),
    ("POST", "/models/{model}/v1/{rest}"): (GENERATES, OPENAI),
    ("GET", "/v1/models"): (set(), OPENAI),
    ("GET", "/v1/models/{id}"): (set(), OPENAI),
    ("GET", "/models/{model}/v1/models"): (set(), OPENAI),
    ("POST", "/compare"): ({"takes_a_place"}, Dialect.NATIVE),
    ("POST", "/tokenize"): ({"takes_a_place"}, Dialect.NATIVE),
    ("GET", "/report"): (set(), Dialect.NATIVE),
    ("POST", "/report"): ({"admin"}, Dialect.NATIVE),
    ("POST", "/precisions/{name}/load"): ({"admin"}, Dialect.NATIVE),
    ("POST", "/precisions/{name}/unload"): ({"admin"}, Dialect.NATIVE),
    ("GET", "/precisions"): (set(), Dialect.NATIVE),
    ("GET", "/stats"): (set(), Dialect.NATIVE),
    ("GET", "/info"): (set(), Dialect.NATIVE),
    ("GET", "/metrics"): ({"quiet"}, Dialect.NATIVE),
    ("GET", "/models/{model}/info"): (set(), Dialect.NATIVE),
    ("GET", "/models/{model}/health"): ({"public", "quiet"}, Dialect.NATIVE),
    ("POST", "/models/{model}/tokenize"): ({"takes_a_place"}, Dialect.NATIVE),
    ("GET", "/health"): ({"public", "quiet"}, Dialect.NATIVE),
    ("GET", "/health/live"): ({"public", "quiet"}, Dialect.NATIVE),
    ("GET", "/health/ready"): ({"public", "quiet"}, Dialect.NATIVE),
    ("GET", "/favicon.ico"): ({"public"}, Dialect.NATIVE),
    ("GET", "/"): ({"public"}, Dialect.NATIVE),
    ("GET", "/playground/{name}"): ({"public", "quiet"}, Dialect.NATIVE),
}
FLAGS = ("takes_a_place", "generates", "admin", "public", "quiet")


@pytest.fixture(scope="module")
def table() -> RouteTable:
    return RouteTable(ROUTES)


def found(table: RouteTable, method: str, path: str) -> tuple[set[str], Dialect]:
    facts = table.of({"type": "http", "method": method, "path": path})
    return {name for name in FLAGS if getattr(facts, name)}, facts.dialect


def test_every_route_has_these_facts(table: RouteTable) -> None:
    assert all(isinstance(route, APIRoute) for route in ROUTES)
    served: Any = [(method, route.path_format) for route in ROUTES for method in route.methods]
    assert {(method, path): found(table, method, path) for method, path in served} == EXPECTED


def test_every_route_that_takes_a_body_declares_its_facts() -> None:
    assert not [route for route in ROUTES if route.methods != {"GET"} and declared(route) is None]


@pytest.mark.parametrize(
    ("method", "path", "flags", "dialect"),
    [
        ("POST", "/models/a/b/generate", GENERATES, Dialect.NATIVE),
        ("POST", "/models/", GENERATES, Dialect.NATIVE),
        ("POST", "/models/a/v1/nothing", GENERATES, OPENAI),
        ("POST", "/models/a/v1/models", GENERATES, OPENAI),
        ("PUT", "/v1/chat/completions", set(), CHAT),
        ("GET", "/generate", set(), Dialect.NATIVE),
        ("POST", "/v1", set(), OPENAI),
        ("GET", "/v1/nothing", set(), OPENAI),
        ("POST", "/v1completions", set(), Dialect.NATIVE),
        ("POST", "/nothing", set(), Dialect.NATIVE),
        ("HEAD", "/health", {"public", "quiet"}, Dialect.NATIVE),
        ("HEAD", "/report", set(), Dialect.NATIVE),
        ("PUT", "/report", {"admin"}, Dialect.NATIVE),
        ("DELETE", "/precisions/int8/load", {"admin"}, Dialect.NATIVE),
        ("GET", "/precisions/int8/load", set(), Dialect.NATIVE),
    ],
)
def test_other_requests(table: RouteTable, method: str, path: str, flags: set[str], dialect: Dialect) -> None:
    assert found(table, method, path) == (flags, dialect)


@pytest.mark.parametrize("path", ["/report%0A", "/precisions/int8/unload%0A", "/report", "/%72eport"])
def test_a_path_that_the_router_takes_for_an_admins_needs_the_admins_key(
    make_client: MakeClient, path: str
) -> None:
    """A route's pattern ends before a last line feed."""
    client = make_client(api_key="client", admin_api_key="admin")
    assert client.post(path, headers={"Authorization": "Bearer client"}).status_code == 401


def test_what_changes_the_server_needs_the_admins_key() -> None:
    for route in ROUTES:
        if route.path.startswith(("/precisions", "/report")) and route.methods != {"GET"}:
            facts = declared(route)
            assert facts is not None
            assert facts.admin, route.path


def test_a_route_is_found_once_for_a_request(table: RouteTable) -> None:
    scope = {"type": "http", "method": "POST", "path": "/models/a/generate"}
    facts = table.of(scope)
    assert RouteTable([]).of(scope) is facts
    assert RouteTable([]).of({"method": "POST", "path": "/generate"}) == RouteFacts()


def test_an_unknown_route_under_a_models_name_is_refused_in_openais_dialect(client: TestClient) -> None:
    reply = client.post("/models/fake/v1/nothing", json={"inputs": "a"})
    assert reply.status_code == 404
    assert reply.json()["error"]["message"] == "no such route here"
