"""Bad bodies, keys, limits and disconnects: an error for the sender, no effect on others."""

import asyncio
import json
import re
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from server.app import ROUTES as APP_ROUTES
from server.errors import GenerationFailed, ServiceError, Unloaded
from server.http.auth import Auth
from server.http.responses import error_response
from server.http.route_facts import RouteTable
from server.http.streaming import EventStream
from server.settings.server import Settings
from tests.conftest import PATIENCE, Loads, serving, wait_until
from tests.routes.test_generate import PROMPT, greedy

JSON = {"content-type": "application/json"}
ROUTES = ["/generate", "/generate_stream", "/", "/tokenize", "/v1/completions"]


def still_serves(client: TestClient) -> None:
    reply = client.post("/generate", json={"inputs": PROMPT, "max_new_tokens": 3})
    assert reply.json()["generated_text"] == greedy(3)
    app: Any = client.app
    assert app.state.service.places.in_flight == 0


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "body",
    [b"", b'{"inputs": "x"', b"[]", b'"x"', b"null", b'{"inputs": "\xff"}', b'{"temperature": NaN}',
     b'{"temperature": Infinity}', b'{"temperature": 1e999}', b"[" * 200_000, b'{"a":' * 200_000,
     b'{"seed": ' + b"9" * 5000 + b"}"],
)  # fmt: skip
def test_bodies_that_are_no_json_objects(client: TestClient, route: str, body: bytes) -> None:
    reply = client.post(route, content=body, headers=JSON)
    assert reply.status_code == 400
    answer = reply.json()
    assert answer["error"]["type"] == "invalid_request_error" if "/v1" in route else answer["error_type"]
    still_serves(client)


@pytest.mark.parametrize("media", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_other_content_types(client: TestClient, media: str) -> None:
    assert client.post("/generate", content=b"{}", headers={"content-type": media}).status_code == 415


@pytest.mark.parametrize("prompt", ["a\0b", "👩‍👩‍👧‍👦 🇫🇷", "שלום עולם", "\u202e\u0000\uffff"])
def test_unusual_text(client: TestClient, prompt: str) -> None:
    body = {"inputs": prompt, "max_new_tokens": 2, "return_full_text": True}
    reply = client.post("/generate", json=body)
    assert reply.status_code == 200
    assert reply.json()["generated_text"].startswith(prompt)


def test_a_body_over_the_limit(make_client: Callable[..., TestClient]) -> None:
    client = make_client(payload_limit="2kB")
    body = json.dumps({"inputs": "x" * 3000}).encode()
    declared = client.post("/generate", content=body, headers=JSON)
    chunked = client.post("/generate", content=iter([body[:1500], body[1500:]]), headers=JSON)
    assert declared.status_code == chunked.status_code == 413
    assert declared.json()["error_type"] == chunked.json()["error_type"] == "validation"
    still_serves(client)


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nothing", 404), ("PUT", "/generate", 405)])
def test_unknown_routes_and_methods(client: TestClient, method: str, path: str, status: int) -> None:
    native = client.request(method, path)
    assert native.status_code == status
    assert set(native.json()) == {"error", "error_type", "request_id"}
    openai = client.request("GET", "/v1/nothing")
    assert (openai.status_code, openai.json()["error"]["type"]) == (404, "invalid_request_error")


def test_request_ids(client: TestClient) -> None:
    def id_for(value: str) -> str:
        return client.get("/health", headers={"X-Request-ID": value}).headers["x-request-id"]

    assert id_for("abc-1") == "abc-1"
    assert id_for("x" * 10_000) != "x" * 10_000
    assert id_for("a\tb") != "a\tb"


def test_an_internal_error_shows_no_details(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    app: Any = client.app

    def explode(text: str) -> list[int]:
        raise RuntimeError("secret detail")

    with monkeypatch.context() as patch:
        patch.setattr(app.state.default.codec, "encode", explode)
        reply = client.post("/generate", json={"inputs": PROMPT})
    assert reply.status_code == 500
    assert "secret" not in reply.text
    assert reply.json()["request_id"] == reply.headers["x-request-id"]
    still_serves(client)


PUBLIC = {"/health", "/health/live", "/health/ready", "/models/{model}/health", "/favicon.ico"}


def all_routes(client: TestClient) -> list[tuple[str, str]]:
    app: Any = client.app
    paths: dict[str, dict[str, Any]] = app.openapi()["paths"]
    found = [(method.upper(), path) for path, methods in paths.items() for method in methods]
    return [*found, ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/nothing"), ("POST", "/health")]


def test_the_document_describes_every_path_parameter(client: TestClient) -> None:
    app: Any = client.app
    for path, methods in app.openapi()["paths"].items():
        for operation in methods.values():
            parameters = {one["name"] for one in operation.get("parameters", []) if one["in"] == "path"}
            assert parameters == set(re.findall(r"{(\w+)", path)), path


def test_every_route_but_health_needs_the_key(make_client: Callable[..., TestClient]) -> None:
    client = make_client(api_key="right", admin_api_key="admin")
    routes = all_routes(client)
    assert len(routes) > 12
    for method, path in routes:
        if path in PUBLIC:
            continue
        reply = client.request(method, path)
        assert reply.status_code == 401, (method, path)
        assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "key", [b"", b"wrong", b"Bearer", b"Bearer ", b"Bearer wrong", b"Bearer \xe9\xff", b"Basic right"]
)
def test_wrong_keys(make_client: Callable[..., TestClient], key: bytes) -> None:
    client = make_client(api_key="right")
    assert client.get("/v1/models", headers=[(b"authorization", key)]).status_code == 401
    assert client.get("/v1/models", headers={"Authorization": "Bearer right"}).status_code == 200
    for query in ("api_key=right", "token=x", "x-whatever=right", "a=1&b=%72ight"):
        in_query = client.get(f"/v1/models?{query}", headers={"Authorization": "Bearer right"})
        assert in_query.status_code == 401
    for query in ("a=%ff", "%ff", "a=\u00e9", "precision=fp32"):
        others = client.get(f"/v1/models?{query}", headers={"Authorization": "Bearer right"})
        assert others.status_code == 200
    assert client.get("/v1/models", headers={"X-Forwarded-For": "127.0.0.1"}).status_code == 401


def test_a_key_that_is_not_ascii(make_client: Callable[..., TestClient]) -> None:
    client = make_client(api_key="clé")
    sent = [(b"authorization", "Bearer clé".encode())]
    assert client.get("/v1/models", headers=sent).status_code == 200


@pytest.mark.parametrize(
    ("keys", "token", "allowed"),
    [({"api_key": "c", "admin_api_key": "a"}, b"Bearer c", False), ({"api_key": "c"}, b"Bearer c", False),
     ({"api_key": "c", "admin_api_key": "a"}, b"Bearer a", True), ({"admin_api_key": "a"}, b"", False),
     ({}, b"", True)],
)  # fmt: skip
def test_admin_routes(keys: dict[str, str], token: bytes, allowed: bool) -> None:
    auth = Auth(FastAPI(), Settings(**keys), RouteTable(APP_ROUTES))  # type: ignore[arg-type]
    scope = {"type": "http", "method": "POST", "path": "/precisions/int8/load", "query_string": b"",
             "headers": [(b"authorization", token)]}  # fmt: skip
    assert (auth.refusal(scope) is None) is allowed


def test_no_cors_unless_configured(make_client: Callable[..., TestClient]) -> None:
    origin = {"Origin": "https://a.example"}
    assert "access-control-allow-origin" not in make_client().get("/health", headers=origin).headers
    headers = make_client(cors_allow_origin="https://a.example").get("/health", headers=origin).headers
    assert headers["access-control-allow-origin"] == "https://a.example"
    assert "access-control-allow-credentials" not in headers


def test_a_browser_may_send_what_its_client_library_sends(make_client: Callable[..., TestClient]) -> None:
    client = make_client(cors_allow_origin="https://a.example", api_key="right")
    asked = {
        "Origin": "https://a.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-precision,x-stainless-lang",
    }
    reply = client.options("/v1/completions", headers=asked)
    assert reply.status_code == 200
    assert "x-stainless-lang" in reply.headers["access-control-allow-headers"]
    refused = client.options("/v1/completions", headers={**asked, "Origin": "https://b.example"})
    assert refused.status_code == 400
    assert "access-control-allow-origin" not in refused.headers


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_a_client_that_leaves_frees_its_place(
    make_app: Callable[..., FastAPI], loads: Loads, path: str
) -> None:
    loads.prepare = lambda runner: setattr(runner, "delay", 0.02)
    app = make_app()
    with serving(app) as address:
        service, runner = app.state.service, loads.runners["fp32"]
        rude = send(address, path, json.dumps({"inputs": PROMPT, "max_new_tokens": 200}).encode())
        wait_until(lambda: runner.held)
        assert service.places.in_flight == 1
        rude.close()
        wait_until(lambda: service.places.in_flight == 0 and not runner.held)
        assert len(runner.batches) < 190  # of 200: it was not computed to its end


def test_a_slow_body_is_cut_off(make_app: Callable[..., FastAPI]) -> None:
    with serving(make_app(receive_timeout=0.3)) as address:
        slow = send(address, "/generate", b'{"inp', declared=100)
        slow.settimeout(PATIENCE)
        assert b" 408 " in slow.recv(4096).split(b"\r\n")[0]
        slow.close()


def send(address: str, path: str, body: bytes, declared: int | None = None) -> socket.socket:
    where = urlsplit(address)
    connection = socket.create_connection((where.hostname or "", where.port or 0))
    length = len(body) if declared is None else declared
    head = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {length}"]
    connection.sendall("\r\n".join([*head, "", ""]).encode() + body)
    return connection


def test_a_stream_is_closed_even_if_it_never_begins() -> None:
    closed = list[bool]()

    async def never() -> Any:
        await asyncio.Event().wait()
        yield b""

    async def gone() -> Any:
        return {"type": "http.disconnect"}

    async def send_nothing(message: Any) -> None:
        await asyncio.Event().wait()

    response = EventStream(never(), lambda: closed.append(True), {})
    asyncio.run(response({"type": "http", "path": "/"}, gone, send_nothing))
    assert len(closed) == 1


def test_a_failed_generation_is_not_to_be_retried() -> None:
    def answer(error: ServiceError, path: str) -> Any:
        return error_response(error, {"type": "http", "path": path})

    assert answer(GenerationFailed("x"), "/generate").status_code == 424
    openai = answer(GenerationFailed("x"), "/v1/completions")
    assert (openai.status_code, openai.headers["x-should-retry"]) == (500, "false")
    again = answer(Unloaded("x"), "/v1/completions")
    assert (again.status_code, again.headers["x-should-retry"]) == (500, "true")
