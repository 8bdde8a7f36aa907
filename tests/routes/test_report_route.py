"""``/report`` and precision ``auto`` over HTTP: stored and new reports, choices and refusals."""

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from server.app import create_app
from server.report import plots, store
from server.report.auto import resolve_default
from server.report.background import Reports
from server.report.subject import Reading
from server.served_model import Wanted
from server.settings.server import Settings
from tests import checkpoints
from tests.conftest import Loads, entered, until, wait_until
from tests.fakes import fake_checkpoint
from tests.routes.test_generate import PROMPT

READING = Reading("a text", 10, "0" * 64, None, None, 2)
# weights, speed of one row to fp32's, perplexity ratio, mean KL
FIGURES = {"fp32": (4000, 1.0, 1.0, 0.0), "bf16": (2000, 2.0, 1.001, 1e-4), "nf4": (600, 3.0, 1.1, 5e-2)}


def speed_of(ratio: float, *ratios: float) -> dict[str, Any]:
    """Of runs in turn with fp32; without ``ratios`` all alike."""
    runs = list(ratios or [ratio] * 5)
    batch = {
        "decode_tokens_per_second": 100 * ratio,
        "ratio_to_fp32": ratio,
        "ttft_ms": 5.0,
        "decode_rates": [100 * one for one in runs],
        "reference_rates": [100.0] * len(runs),
        "ratios": runs,
        "inter_token_ms": [10 / ratio] * 101,
    }
    return {"prompt": 32, "tokens": 48, "batches": {"1": batch, "8": batch}}


def keep_report(reports: Reports, figures: dict[str, tuple[int, float, float, float]] = FIGURES) -> None:
    """A made-up finished report in the cache."""
    assert reports.subject is not None
    kept = store.SavedReport(reports.subject, READING)
    for name, (weights, ratio, perplexity, kl) in figures.items():
        loading = {
            "load_seconds": 0.5, "disk_bytes": 4000, "weights_bytes": weights, "kv_cache_bytes": 1000,
            "bits_per_weight": 8.0, "proof": None,
        }  # fmt: skip
        quality = {
            "perplexity": 20 * perplexity, "perplexity_ratio": perplexity, "perplexity_ratio_error": 0.001,
            "mean_kl": kl, "p99_kl": kl, "top1_agreement": 1 - kl, "tokens": 100, "scored": 99, "window": 64,
            "stride": 32,
        }  # fmt: skip
        kept.keep(name, "loading", loading)
        kept.keep(name, "speed", speed_of(ratio))
        kept.keep(name, "quality", quality)
    kept.finish()


def reports_of(client: TestClient) -> Reports:
    app: Any = client.app
    found: Reports = app.state.default.reports
    return found


def ask(client: TestClient, **body: Any) -> Any:
    return client.post("/generate", json={"inputs": PROMPT, "max_new_tokens": 2, **body})


def test_without_a_report_the_error_says_how_to_make_one(client: TestClient) -> None:
    reply = client.get("/report")
    assert (reply.status_code, reply.json()["error_type"]) == (404, "not_found")
    assert "make one with `bitdial report --model bundled` or POST /report" in reply.json()["error"]
    answer = client.get("/stats").json()["report"]
    assert (answer["finished"], answer["recommendation"]) == (None, None)
    assert "bitdial report" in answer["note"]


def test_a_kept_report_is_seen_by_a_server_that_runs(client: TestClient) -> None:
    assert client.get("/report").status_code == 404
    keep_report(reports_of(client))
    answer = client.get("/report").json()
    assert answer["recommendation"]["precision"] == "bf16"
    assert (
        answer["recommendation"]["sentences"][0]
        == "Run bf16: 2.0 × smaller, perplexity +0.1 %, 2.0 × faster here."
    )
    assert answer["front"] == ["bf16", "fp32", "nf4"]
    stats = client.get("/stats").json()["report"]
    assert (stats["recommendation"], stats["finished"]) == ("bf16", answer["finished"])
    assert stats["precisions"]["nf4"]["tokens_per_second"] == {"1": 300.0, "8": 300.0}
    assert stats["precisions"]["nf4"]["perplexity_ratio"] == 1.1


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("", "application/json"),
        ("*/*", "application/json"),
        ("text/markdown", "text/markdown"),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", "text/html"),
        ("application/json;q=0.5, text/markdown;q=0.8", "text/markdown"),
        ("text/html;q=nonsense, text/markdown;q=0", "application/json"),
    ],
)
def test_the_accepted_content_type_is_returned(client: TestClient, accept: str, kind: str) -> None:
    keep_report(reports_of(client))
    reply = client.get("/report", headers={"Accept": accept})
    assert reply.headers["content-type"].split(";")[0] == kind
    assert "Run bf16" in reply.text


def test_a_model_of_an_awkward_name_is_escaped(client: TestClient) -> None:
    reports = reports_of(client)
    keep_report(reports)
    report = reports.latest()
    assert report is not None
    report.document["model"]["name"] = "<script>alert(1)</script>"
    page = client.get("/report", headers={"Accept": "text/html"}).text
    assert "<script>" not in page


def test_auto_chooses_by_the_report(client: TestClient) -> None:
    keep_report(reports_of(client))
    reply = ask(client, precision="auto")
    assert reply.json()["precision"] == reply.headers["x-precision"] == "bf16"
    assert reply.json()["precision_requested"] == "auto"
    assert reply.json()["auto"]["decided_by"] == ["balance"]
    reply = ask(client, auto={"max_memory_bytes": 2000})  # bounds alone select it, too
    assert reply.json()["precision"] == "nf4"
    assert reply.json()["auto"] == {
        "decided_by": ["max_memory_bytes"],
        "reason": "nf4 is the best balance of size and speed "
        "within max_memory_bytes 2000 (it has 1,600 bytes)",
    }
    assert "auto" not in ask(client, precision="bf16").json()


@pytest.mark.parametrize("way", ["header", "query", "model"])
def test_auto_is_accepted_wherever_a_precision_is(client: TestClient, way: str) -> None:
    keep_report(reports_of(client))
    path = {"query": "/generate?precision=auto", "model": "/models/fake:auto/generate"}.get(way, "/generate")
    headers = {"X-Precision": "auto"} if way == "header" else {}
    body = {"inputs": PROMPT, "max_new_tokens": 2, "auto": {"prefer": "quality"}}
    reply = client.post(path, json=body, headers=headers).json()
    assert (reply["precision"], reply["auto"]["decided_by"]) == ("fp32", ["prefer"])


def test_auto_in_openais_dialect_and_in_streams(client: TestClient) -> None:
    keep_report(reports_of(client))
    body = {"model": "fake:auto", "prompt": PROMPT, "max_tokens": 2, "auto": {"max_kl": 1e-3}}
    reply = client.post("/v1/completions", json=body).json()
    assert (reply["precision"], reply["precision_requested"]) == ("bf16", "auto")
    assert reply["auto"]["reason"].startswith("bf16 is the best balance")
    streamed = client.post("/v1/completions", json={**body, "stream": True}).text
    first = json.loads(streamed.split("\n")[0].removeprefix("data: "))
    assert first["auto"] == reply["auto"]
    text = client.post(
        "/generate_stream", json={"inputs": PROMPT, "max_new_tokens": 2, "precision": "auto"}
    ).text
    last = json.loads(text.strip().split("\n")[-1].removeprefix("data: "))
    assert (last["precision"], last["auto"]["decided_by"]) == ("bf16", ["balance"])


def test_if_none_is_within_the_bounds_the_error_names_the_nearest(client: TestClient) -> None:
    keep_report(reports_of(client))
    reply = ask(client, precision="auto", auto={"min_tokens_per_second": 400})
    assert (reply.status_code, reply.json()["error_type"]) == (422, "validation")
    assert "the nearest is nf4, with 300.0 tokens a second (asked for: 400.0 tokens" in reply.json()["error"]
    body = {"prompt": PROMPT, "precision": "auto", "auto": {"min_tokens_per_second": 400}}
    reply = client.post("/v1/completions", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "auto")


def test_without_a_report_auto_says_how_to_make_one(client: TestClient) -> None:
    reply = ask(client, precision="auto")
    assert (reply.status_code, reply.json()["error_type"]) == (409, "unavailable")
    assert "bitdial report --model bundled" in reply.json()["error"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"precision": "bf16", "auto": {}}, 422),
        ({"precision": "auto", "auto": {"max_memory": 5}}, 422),
        ({"precision": "auto", "auto": {"max_kl": -1}}, 422),
        ({"precision": "auto", "auto": {"prefer": "beauty"}}, 422),
        ({"precision": "auto", "auto": "quality"}, 422),
        ({"precision": "auto", "auto": {"max_memory_bytes": 1.5}}, 422),
    ],
)
def test_bounds_that_are_none(client: TestClient, body: dict[str, Any], status: int) -> None:
    keep_report(reports_of(client))
    assert ask(client, **body).status_code == status


def test_auto_as_the_servers_default(tmp_path: Path, loads: Loads) -> None:
    checkpoint = fake_checkpoint(tmp_path)
    auto: dict[str, Any] = {"precision": "auto", "auto_max_perplexity_increase": 0.2, "auto_prefer": "memory"}
    settings = Settings(**{**auto, "precisions": "fp32,bf16", "device": "cpu"})
    reports = Reports(settings, checkpoint)
    asyncio.run(reports.find_subject())
    keep_report(reports)
    settings, choice = resolve_default(settings, reports)
    app = create_app(settings, first=Wanted(lambda: checkpoint, settings, choice), load=loads)
    with TestClient(app) as client:
        wait_until(lambda: client.get("/health").status_code == 200)
        assert client.get("/health").json()["precision"] == "nf4"
        assert client.get("/info").json()["precision"] == "nf4"
        reply = ask(client).json()
        assert (reply["precision"], reply["precision_requested"]) == ("nf4", "auto")
        assert reply["auto"]["decided_by"] == ["prefer"]
        assert ask(client, precision="fp32").json()["precision"] == "fp32"
        # a request's bounds override the server's
        assert ask(client, auto={"prefer": "quality"}).json()["precision"] == "fp32"


def test_auto_as_the_default_without_a_report_is_refused_at_the_start(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from server.__main__ import main

    assert main(["serve", "--precision", "auto", "--port", "0"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "--precision (or PRECISION) auto" in last
    assert "`bitdial report --model bundled`" in last


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save(checkpoints.gpt2(), tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def app(model: Path, forked_processes: None) -> FastAPI:
    return create_app(Settings(model_id=str(model), precisions="fp32", device="cpu", threads=1))


TEXT = "the other theatre, and in another one, the café again\n" * 20


def events_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line]


async def made_by(app: FastAPI, **body: Any) -> list[dict[str, Any]]:
    async with entered(app) as client:
        reply = await client.post("/report", json=body)
        assert reply.headers["content-type"].startswith("text/event-stream"), reply.text
        kept = (await client.get("/report")).json()
    return [*events_of(reply.text), kept]


def test_a_report_is_made_while_serving(app: FastAPI) -> None:
    *events, kept = asyncio.run(made_by(app, text=TEXT, precisions=["nf4"], plots=False))
    assert events[0] == {"status": "starting"}
    assert events[-1]["status"] == "ready"
    assert events[-1]["recommendation"] == kept["recommendation"]
    measuring = events[1:-1]
    assert {one["status"] for one in measuring} == {"measuring"}
    assert [one["step"] for one in measuring] == sorted(one["step"] for one in measuring)
    assert {one["stage"] for one in measuring} >= {
        "measuring speed",
        "scoring",
        "continuing",
        "comparing weights",
    }
    assert list(kept["precisions"]) == ["fp32", "nf4"]
    assert kept["text"]["name"] == "the text of the request"


def test_a_report_that_fails_ends_with_the_reason(app: FastAPI) -> None:
    async def fail() -> list[dict[str, Any]]:
        async with entered(app) as client:
            reply = await client.post("/report", json={"text": "x", "precisions": ["fp32"], "plots": False})
            return events_of(reply.text)

    last = asyncio.run(fail())[-1]
    assert last["error_type"] == "generation"
    assert "the text of the request has 1 tokens; at least two are needed" in last["error"]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"precisions": ["int3"]}, 422, "unknown precision"),
        ({"precisions": []}, 422, "must name"),
        ({"text": ""}, 422, "text"),
        ({"speed": False}, 422, "unknown field 'speed'"),
        ({"plots": True}, 409, "pip install matplotlib"),
    ],
)
def test_refusals(
    client: TestClient, body: dict[str, Any], status: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    reply = client.post("/report", json=body)
    assert reply.status_code == status
    assert message in reply.json()["error"]


def test_no_room(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    from server.host import memory

    monkeypatch.setattr(memory, "needed_bytes", lambda name, spec: 10**15)
    reply = client.post("/report", json={"plots": False})
    assert reply.status_code == 503
    assert "no room to measure" in reply.json()["error"]


def test_only_the_administrator_has_one_made(make_client: Callable[..., TestClient]) -> None:
    client = make_client(api_key="k", admin_api_key="a")
    as_client, as_admin = ({"Authorization": f"Bearer {key}"} for key in "ka")
    assert client.post("/report", json={"precisions": ["int3"]}, headers=as_client).status_code == 401
    assert client.post("/report", json={"precisions": ["int3"]}, headers=as_admin).status_code == 422
    assert client.get("/report").status_code == 401
    assert client.get("/report", headers=as_client).status_code == 404


class Sleeper:
    """Replaces the measuring process by one that does nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        command = [sys.executable, "-c", "import time; print('{\"status\": 1}', flush=True); time.sleep(60)"]
        monkeypatch.setattr("server.report.background.start_command", lambda *_: command)


def test_a_report_pauses_while_requests_run_and_ends_with_its_client(
    make_app: Callable[..., FastAPI], monkeypatch: pytest.MonkeyPatch
) -> None:
    Sleeper(monkeypatch)
    options = {"precisions": ["fp32"], "quality": True, "plots": False, "fresh": False}

    async def watch() -> None:
        app = make_app()
        async with entered(app) as client:
            reports, service = app.state.default.reports, app.state.service
            events = reports.make(options, None)
            assert [await anext(events), await anext(events)] == [{"status": "starting"}, {"status": 1}]
            process = psutil.Process(reports._process.pid)
            second = await client.post("/report", json={"plots": False})
            assert (second.status_code, second.json()["error_type"]) == (429, "overloaded")
            with service.places.reserved():
                await until(lambda: process.status() == psutil.STATUS_STOPPED)
            await until(lambda: process.status() != psutil.STATUS_STOPPED)
            with service.places.reserved():
                await until(lambda: process.status() == psutil.STATUS_STOPPED)
                await events.aclose()  # killed, although it is stopped
            assert not process.is_running()
            again = reports.make(options, None)
            await anext(again)
            process = psutil.Process(reports._process.pid)
        wait_until(lambda: not process.is_running())  # with the server

    asyncio.run(watch())


def test_a_dead_process_is_reported(
    make_app: Callable[..., FastAPI], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "server.report.background.start_command", lambda *_: [sys.executable, "-c", "raise SystemExit(3)"]
    )

    async def run() -> list[dict[str, Any]]:
        async with entered(make_app()) as client:
            return events_of((await client.post("/report", json={"plots": False})).text)

    assert "its process ended" in asyncio.run(run())[-1]["error"]
