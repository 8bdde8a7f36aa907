"""What the models of a server share: places, memory, the start and the end, one report at a time."""

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from loaders.errors import CheckpointError
from server.host import memory
from server.service.kv_memory import KVMemory
from server.settings.server import Settings
from tests.conftest import entered, until, wait_until
from tests.fakes import FakeRunner, fake_checkpoint, fake_model
from tests.routes.several_models.conftest import BODY, Make
from tests.two_models import FIRST, LARGE, SMALL, Runners, is_ready, two_models

SLOTS = 4


def test_places_are_shared(make: Make) -> None:
    client = make(max_concurrent_requests=2)
    body = {"prompt": ["x", "y", "z"], "max_tokens": 3, "model": "small"}
    assert client.post("/v1/completions", json=body).status_code == 400  # more than all places together
    with client.app.state.places.reserved():  # type: ignore[attr-defined]
        refused = client.post(
            "/v1/completions", json={"prompt": ["x", "y"], "max_tokens": 3, "model": "small"}
        )
    assert refused.status_code == 429


def size(context: int) -> int:
    """Bytes of one loaded precision of a model with that context."""
    return memory.used_bytes(fake_model("fp32", FakeRunner(SLOTS, context)))


def test_memory_is_shared_and_idle_precisions_of_any_model_make_room(
    make: Make, runners: Runners, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = {"bytes": 1}
    monkeypatch.setattr("server.service.pool.memory.needed_bytes", lambda name, spec: needed["bytes"])
    client = make(max_batch_size=SLOTS, memory_budget=2 * size(LARGE) + size(SMALL))
    needed["bytes"] = size(SMALL)
    assert client.post("/generate?model=small&precision=fp16", json=BODY).status_code == 200
    assert runners["large", "bf16"].closed or runners["small", "fp32"].closed
    assert not runners["large", "fp32"].closed  # the server's default precision stays
    loaded = {key for key, runner in runners.items() if not runner.closed}
    needed["bytes"] = size(LARGE) + 2 * size(SMALL) + 1  # more than everything beside it takes
    refused = client.post("/generate?model=small&precision=nf4", json=BODY)
    assert refused.status_code == 503
    assert refused.json()["error"].startswith(
        f"no room for owner/small:nf4: it needs {needed['bytes']} bytes"
    )
    assert {key for key, runner in runners.items() if not runner.closed} == loaded


def test_nothing_is_unloaded_for_what_is_loaded_at_the_start(
    make: Make, runners: Runners, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.service.pool.memory.needed_bytes", lambda name, spec: size(spec.max_tokens))
    room = 2 * size(LARGE) + size(SMALL)
    client = make(max_batch_size=SLOTS, memory_budget=room, precisions="fp32,bf16,fp16,nf4")
    wait_until(lambda: not client.app.state.default.pool.is_busy())  # type: ignore[attr-defined]
    assert not any(runner.closed for runner in runners.values())
    assert runners.keys() == FIRST
    assert client.post("/generate?precision=nf4", json=BODY).status_code == 200  # a request does make room
    assert runners["large", "bf16"].closed or runners["small", "fp32"].closed


def test_health_is_of_the_default_model_or_the_one_that_is_named(client: TestClient) -> None:
    for path in ("/health", "/health/ready"):
        assert client.get(path, params={"model": "small"}).json() == {"status": "ready", "precision": "fp32"}
    client.post("/precisions/fp32/unload?model=small")
    assert client.get("/health/ready").status_code == 200
    refused = client.get("/health/ready?model=small")
    assert (refused.status_code, refused.json()["error"]) == (503, "owner/small:fp32 is unloaded")
    unknown = client.get("/health/ready?model=medium")
    assert (unknown.status_code, unknown.json()["error"]) == (404, "no such model here")


def test_a_model_that_can_not_be_loaded_leaves_the_other_ready(make: Make, runners: Runners) -> None:
    client = make()
    pool = client.app.state.models["owner/small"].pool  # type: ignore[attr-defined]

    def fail(*_: Any) -> Any:
        raise CheckpointError("the file is cut short")

    pool._load_model = fail
    refused = client.post("/generate?model=small&precision=fp16", json=BODY)
    assert refused.status_code == 503
    assert refused.json()["error"] == "owner/small:fp16 could not be loaded: the file is cut short"
    assert client.get("/health/ready").status_code == 200
    assert client.post("/generate", json=BODY).json()["generated_text"] == "aaa"
    assert client.post("/generate?model=small", json=BODY).json()["generated_text"] == "bbb"


def test_one_report_is_made_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measuring = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr("server.report.background.start_command", lambda *_: measuring)
    options = {"precisions": ["fp32"], "quality": False, "plots": False, "fresh": False}

    async def check() -> None:
        app = two_models(tmp_path, {})
        async with entered(app) as client:
            of_large = app.state.default.reports.make(options, None)
            assert await anext(of_large) == {"status": "starting"}
            refused = await client.post("/report?model=small", json={"precisions": ["fp32"], "plots": False})
            assert (refused.status_code, refused.json()["error"]) == (429, "a report is being made already")
            await of_large.aclose()
            of_small = app.state.models["owner/small"].reports.make(options, None)
            assert await anext(of_small) == {"status": "starting"}
            await of_small.aclose()

    asyncio.run(check())


def test_each_model_has_its_own_shadow(make: Make, runners: Runners) -> None:
    client = make(shadow_precision="bf16", shadow_fraction=1.0)
    wait_until(lambda: ("small", "bf16") in runners)

    def compared(model: str) -> int:
        found = client.get("/stats", params={"model": model}).json()["shadow"]["precisions"]
        return int(found["fp32"]["requests"]["compared"]) if "fp32" in found else 0

    client.post("/generate?model=small", json=BODY)
    wait_until(lambda: compared("small") == 1)
    assert compared("large") == 0


def test_a_server_that_drains_refuses_both_and_finishes_what_runs(tmp_path: Path) -> None:
    runners: Runners = {}

    async def check() -> None:
        app = two_models(tmp_path, runners)
        async with entered(app) as client:
            await until(lambda: is_ready(app))
            for runner in runners.values():
                runner.delay = 0.02
            long = {"inputs": "x", "max_new_tokens": 40}
            running = [
                asyncio.create_task(client.post(f"/generate?model={model}", json=long))
                for model in ("large", "small")
            ]
            await until(lambda: app.state.in_flight == 2)
            app.state.lifecycle.drain()
            for model in ("large", "small"):
                assert (await client.post(f"/generate?model={model}", json=BODY)).status_code == 503
                assert (await client.get(f"/health/ready?model={model}")).status_code == 503
            texts = [answer.json()["generated_text"] for answer in await asyncio.gather(*running)]
            assert texts == ["a" * 40, "b" * 40]
            assert app.state.in_flight == 0

    asyncio.run(check())


def test_caches_have_memory_where_the_default_precisions_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "needed_bytes", lambda name, spec: 40_000)
    settings = Settings(device="cpu", precisions="fp32", memory_budget=100_000)
    spec = settings.spec(fake_checkpoint(tmp_path), slots=1)

    def limit(models: int) -> int | None:
        cache = KVMemory(settings, lambda: [(spec, ("fp32",))] * models)
        budget = asyncio.run(cache.within(spec)).kv_budget
        assert budget is not None
        return budget.limit

    assert limit(2) == 10_000  # half of what is free beside both
    assert limit(3) == 5_000  # a quarter of what is free beside the server's default one and another
