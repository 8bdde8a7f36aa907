"""Loading and unloading over HTTP: progress, refusals, repeats, and keys."""

import asyncio
import gc
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

import loaders
from loaders.base import Availability, LoadedModel, ModelSpec, Progress, ignore_progress
from loaders.errors import CheckpointError, OutOfMemory
from server.host import memory
from tests.conftest import PATIENCE, Loads, at_rest, entered, serving, until, wait_until
from tests.http.test_http_robustness import send
from tests.routes.test_generate import PROMPT, ask, events, greedy

MakeApp = Callable[..., FastAPI]
STATES = {"unloaded", "loading", "loaded", "failed", "unavailable"}


class Held(Loads):
    """Loads of int8 wait for this event."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, precision: str, spec: ModelSpec, progress: Progress = ignore_progress) -> Any:
        if precision == "int8":
            self.begun.set()
            for step in range(3):
                progress("quantizing", step + 1, 3)
            assert self.go.wait(PATIENCE)
        return super().__call__(precision, spec, progress)


@pytest.fixture
def loads() -> Held:
    return Held()


def states(client: TestClient) -> dict[str, str]:
    return {row["name"]: row["state"] for row in client.get("/precisions").json()}


def test_the_list_has_every_precision(client: TestClient) -> None:
    wait_until(lambda: client.app.state.pool.state("bf16").engine)  # type: ignore[attr-defined]
    rows = {row["name"]: row for row in client.get("/precisions").json()}
    assert list(rows) == list(loaders.PRECISIONS)
    for name, row in rows.items():
        assert set(row) == {"name", "aliases", "state", "reason", "install"}
        assert (row["aliases"], row["state"] in STATES) == (loaders.aliases(name), True)
    assert [rows[name]["state"] for name in ("fp32", "bf16", "fp16")] == ["loaded", "loaded", "unloaded"]


def test_loading_streams_its_progress_and_ends_ready(client: TestClient, loads: Held) -> None:
    loads.go.set()
    reply = client.post("/precisions/8bit/load")
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["x-accel-buffering"] == "no"
    *progress, last = events(reply.text)
    assert last == {"status": "ready"}
    assert progress
    for event in progress:
        assert set(event) == {"status", "stage", "progress"}
        assert event["status"] == "loading"
        assert 0 <= event["progress"]["current"] <= event["progress"]["total"]
    assert states(client)["int8"] == "loaded"
    assert ask(client, max_new_tokens=2, precision="int8")["precision"] == "int8"
    assert events(client.post("/precisions/int8/load").text) == [{"status": "ready"}]
    assert loads.names.count("int8") == 1


def test_progress_comes_while_it_loads(make_app: MakeApp, loads: Held) -> None:
    path = "/precisions/int8/load"
    with serving(make_app()) as address, httpx.stream("POST", address + path, timeout=PATIENCE) as reply:
        lines = (json.loads(line[6:]) for line in reply.iter_lines() if line)
        seen = next(event for event in lines if event["progress"]["current"] == 3)
        assert (seen["stage"], seen["progress"]["total"]) == ("quantizing", 3)
        rows = httpx.get(f"{address}/precisions", timeout=PATIENCE).json()
        assert next(row["state"] for row in rows if row["name"] == "int8") == "loading"
        assert httpx.get(f"{address}/health", timeout=PATIENCE).status_code == 200
        loads.go.set()
        assert list(lines)[-1] == {"status": "ready"}


@pytest.mark.parametrize(
    ("error", "expected"),
    [(CheckpointError("the weights are truncated"), "truncated"), (OutOfMemory("no room here"), "no room"),
     (RuntimeError("/secret/path"), "RuntimeError")],
)  # fmt: skip
def test_a_load_that_fails_is_one_last_event(
    client: TestClient, loads: Held, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str
) -> None:
    def fail(*arguments: object) -> LoadedModel:
        raise error

    app: Any = client.app
    monkeypatch.setattr(app.state.pool, "_load_model", fail)
    reply = client.post("/precisions/int8/load")
    assert reply.status_code == 200
    *progress, last = events(reply.text)
    assert all(one["status"] == "loading" for one in progress)
    assert (last["status"], last["error_type"]) == ("failed", "unavailable")
    assert expected in last["error"]
    assert "secret" not in reply.text
    row = next(row for row in client.get("/precisions").json() if row["name"] == "int8")
    assert row["state"] == "failed"
    assert expected in row["reason"]
    asked = client.post("/generate", json={"inputs": PROMPT, "precision": "int8"})
    assert (asked.status_code, asked.json()["error_type"]) == (503, "unavailable")
    assert int(asked.headers["retry-after"]) >= 1
    assert ask(client, max_new_tokens=2)["generated_text"] == greedy(2)


def test_not_enough_memory_is_reported_with_both_figures(
    make_client: Callable[..., TestClient], loads: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads.go.set()
    client = make_client(precisions="fp32")
    monkeypatch.setattr(memory, "needed_bytes", lambda precision, spec: 1000)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10)
    last = events(client.post("/precisions/int8/load").text)[-1]
    assert last["error_type"] == "unavailable"
    assert "needs 1000 bytes, 10 are free" in last["error"]
    asked = client.post("/v1/completions", json={"prompt": PROMPT, "model": "fake:int8"})
    assert asked.status_code == 503
    assert "1000" in asked.json()["error"]["message"]
    monkeypatch.undo()
    assert events(client.post("/precisions/int8/load").text)[-1] == {"status": "ready"}


def test_what_the_host_cannot_run(
    make_client: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loaders.availability

    def availability(name: str, device: Any) -> Availability:
        return Availability("it lacks a part", "pip install part") if name == "nf4" else real(name, device)

    monkeypatch.setattr(loaders, "availability", availability)
    client = make_client()
    row = next(row for row in client.get("/precisions").json() if row["name"] == "nf4")
    assert (row["state"], row["reason"], row["install"]) == (
        "unavailable",
        "it lacks a part",
        "pip install part",
    )
    asked = [
        client.post("/precisions/nf4/load"),
        client.post("/generate", json={"inputs": PROMPT, "precision": "4bit"}),
        client.post("/generate_stream", json={"inputs": PROMPT, "precision": "4bit"}),
    ]
    for reply in asked:
        assert (reply.status_code, reply.json()["error_type"]) == (409, "unavailable")
        assert "it lacks a part" in reply.json()["error"]
        assert "pip install part" in reply.json()["error"]
    openai = client.post("/v1/completions", json={"prompt": PROMPT, "model": "fake:nf4"})
    assert (openai.status_code, openai.json()["error"]["code"]) == (409, "precision_unavailable")
    assert client.post("/precisions/nf4/unload").json()["state"] == "unavailable"
    names = {entry["id"] for entry in client.get("/v1/models").json()["data"]}
    assert "fake:nf4" not in names


def test_nothing_is_loaded_while_the_server_is_shutting_down(client: TestClient, loads: Held) -> None:
    app: Any = client.app
    app.state.lifecycle.drain()
    for path in ("/precisions/int8/load", "/tokenize"):
        reply = client.post(path, json={"inputs": PROMPT})
        assert (reply.status_code, reply.json()["error_type"]) == (503, "unavailable")
        assert int(reply.headers["retry-after"]) >= 1
    assert "int8" not in loads.names


@pytest.mark.parametrize("action", ["load", "unload"])
def test_unknown_precisions_and_wrong_methods(client: TestClient, action: str) -> None:
    reply = client.post(f"/precisions/int3/{action}")
    assert (reply.status_code, reply.json()["error_type"]) == (422, "validation")
    assert "choose from fp32" in reply.json()["error"]
    assert client.get(f"/precisions/int8/{action}").status_code == 405


def test_fifty_first_requests_and_an_admin_are_one_load(make_app: MakeApp, loads: Held) -> None:
    async def main() -> None:
        async with entered(app) as client:
            body = {"inputs": PROMPT, "max_new_tokens": 3, "precision": "8bit"}
            tasks = [asyncio.create_task(client.post("/generate", json=body)) for _ in range(50)]
            admin = asyncio.create_task(client.post("/precisions/int8/load"))
            await until(lambda: app.state.service.places.in_flight == 50 and loads.begun.is_set())
            loads.go.set()
            replies = [(await task).json() for task in tasks]
            assert [(one["precision"], one["generated_text"]) for one in replies] == [
                ("int8", greedy(3))
            ] * 50
            assert events((await admin).text)[-1] == {"status": "ready"}
            assert loads.names.count("int8") == 1
            await at_rest(app, client, "int8")

    app = make_app()
    asyncio.run(main())


@pytest.mark.parametrize("fails", [False, True])
def test_a_disconnected_admin_does_not_stop_the_load(
    make_app: MakeApp, loads: Held, caplog: pytest.LogCaptureFixture, fails: bool
) -> None:
    app = make_app()
    with serving(app) as address:
        if fails:
            loads.prepare = out_of_room
        leaving = send(address, "/precisions/int8/load", b"")
        wait_until(loads.begun.is_set)
        assert leaving.recv(4096).startswith(b"HTTP/1.1 200")
        leaving.close()
        time.sleep(0.3)
        loads.go.set()
        wait_until(lambda: app.state.pool.state("int8").state == ("failed" if fails else "loaded"))
        gc.collect()
    ours = [record for record in caplog.records if record.name.startswith(("server", "asyncio"))]
    assert not [record.message for record in ours if record.levelname == "ERROR"]


def out_of_room(runner: object) -> None:
    raise OutOfMemory("no room here")


@pytest.mark.parametrize(
    ("keys", "key", "status"),
    [({"api_key": "c", "admin_api_key": "a"}, "a", 200), ({"api_key": "c", "admin_api_key": "a"}, "c", 401),
     ({"api_key": "c", "admin_api_key": "a"}, None, 401), ({"api_key": "c"}, "c", 401),
     ({"admin_api_key": "a"}, None, 401), ({"admin_api_key": "a"}, "a", 200), ({}, None, 200)],
)  # fmt: skip
@pytest.mark.parametrize("action", ["load", "unload"])
def test_which_keys_may_load(
    make_client: Callable[..., TestClient], keys: dict[str, str], key: str | None, status: int, action: str
) -> None:
    client = make_client(**keys)
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    reply = client.post(f"/precisions/bf16/{action}", headers=headers)
    assert reply.status_code == status
    if status == 401:
        assert reply.json()["error_type"] == "unauthorized"
        app: Any = client.app
        assert app.state.pool.state("bf16").state in ("loading", "loaded")


def test_reading_needs_no_admin_key(make_client: Callable[..., TestClient]) -> None:
    client = make_client(admin_api_key="a")
    assert client.get("/precisions").status_code == 200
    assert ask(client, max_new_tokens=2)["generated_text"] == greedy(2)


def test_a_missing_body_does_not_break_a_running_response(
    make_app: MakeApp, loads: Held, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(receive_timeout=0.2)
    with serving(app) as address:
        slow = send(address, "/precisions/int8/load", b"", declared=10)
        slow.settimeout(PATIENCE)
        wait_until(loads.begun.is_set)
        time.sleep(0.5)
        loads.go.set()
        said = b""
        while b'"ready"' not in said:
            part = slow.recv(4096)
            assert part, said
            said += part
        slow.close()
    ours = [record for record in caplog.records if record.name.startswith(("server", "asyncio"))]
    assert not [record.message for record in ours if record.levelname == "ERROR"]
