import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import ClassVar

import pytest

import loaders
from server.__main__ import main
from server.planning import job
from server.planning.store import alone
from server.planning.workload import Frontend
from tests.conftest import wait_until
from tests.planning import measured

ARGUMENTS = ["plan", "--device", "cpu", "--precisions", "fp32,dynamic-int8", "--no-http"]
SHAPE = ["--prompt", "32", "--tokens", "16", "--requests-per-second", "20"]


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces measuring by known step times; loading is real. Records what is measured."""
    return measured.instead_of_measuring(monkeypatch)


def test_a_plan_is_a_table_a_sentence_and_json(
    counted: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    goals = ["--ttft-slo", "500", "--itl-slo", "50", "--price-per-hour", "0.2", "--json", str(file)]
    assert main([*ARGUMENTS, *SHAPE, *goals]) == 0
    assert counted == ["fp32", "dynamic-int8"]
    text = capsys.readouterr().out
    assert "▸ Fewest replicas:" in text
    assert "per M tokens" in text
    plan = json.loads(file.read_text())
    assert plan == json.loads(text.splitlines()[-1])
    best = plan["choices"][0]
    assert best["simulated"]["ttft_p99_ms"] <= 500
    assert best["simulated"]["itl_p99_ms"] <= 50
    assert best["cost_per_million_tokens"] == pytest.approx(best["replicas"] * 0.2 / (20 * 16 * 3600) * 1e6)


def test_step_times_are_measured_once_and_again_on_request(counted: list[str]) -> None:
    assert main([*ARGUMENTS, *SHAPE]) == 0
    assert main([*ARGUMENTS, *SHAPE]) == 0
    assert counted == ["fp32", "dynamic-int8"]
    assert main([*ARGUMENTS, *SHAPE, "--fresh"]) == 0
    assert len(counted) == 4


def test_what_cannot_be_met_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGUMENTS, *SHAPE, "--itl-slo", "1"]) == 0
    text = capsys.readouterr().out
    assert "can't meet the objectives" in text
    assert "No precision meets the objectives on this host." in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "REQUESTS_PER_SECOND"),
        (["--requests-per-second", "0"], "--requests-per-second"),
        (["--requests-per-second", "1", "--prompt", "9999"], "exceed the context"),
        (["--requests-per-second", "1", "--ttft-slo", "-1"], "--ttft-slo"),
        (["--requests-per-second", "nan"], "--requests-per-second"),
        (["--requests-per-second", "inf"], "--requests-per-second"),
        (["--requests-per-second", "1e300"], "--requests-per-second"),
        (["--requests-per-second", "1e-300"], "--requests-per-second"),
        (["--requests-per-second", "1", "--itl-slo", "nan"], "--itl-slo"),
        (["--requests-per-second", "1", "--price-per-hour", "inf"], "--price-per-hour"),
        (["--requests-per-second", "1", "--tokens", "0"], "--tokens"),
        (["--requests-per-second", "1", "--precisions", "int3"], "int3"),
    ],
)
def test_usage_errors_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["plan", "--device", "cpu", *arguments])
    except SystemExit as end:
        code = int(end.code or 0)
    assert code == 2
    error = capsys.readouterr().err
    assert message.lower().replace("_", "-") in error.lower().replace("_", "-")


def test_one_precision_that_fails_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = loaders.load

    def load(name: str, *rest: object) -> object:
        if name == "fp32":
            raise loaders.errors.CheckpointError("broken")
        return real(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(loaders, "load", load)
    assert main([*ARGUMENTS, *SHAPE]) == 0
    text = capsys.readouterr().out
    assert "fp32 could not be measured: broken." in text
    assert "Fewest replicas: dynamic-int8" in text


class Rounds:
    """``FrontendRounds`` without a server; ``counts`` is what all of them have measured."""

    counts: ClassVar[list[str]] = []

    def __init__(self, client: object, precision: str) -> None:
        self.precision = precision

    async def prepare(self) -> None: ...

    async def round(self) -> None:
        self.counts.append(self.precision)

    def frontend(self, times: object) -> Frontend:
        return Frontend(0.001 * len(self.counts), 0.0, 0.0)


@pytest.mark.parametrize("has_room", [True, False])
def test_http_is_measured_once_between_the_steps_if_there_is_room(
    has_room: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    async def measure(settings: object, precision: str, times: object) -> Frontend:
        asked.append(precision)
        return Frontend(0.007, 0.0, 0.0)

    @asynccontextmanager
    async def own_server(settings: object, precision: str, *sizes: int) -> AsyncIterator[None]:
        asked.append(f"a server of {precision}")
        yield

    monkeypatch.setattr(Rounds, "counts", [])
    monkeypatch.setattr(job, "measure_frontend", measure)
    monkeypatch.setattr(job, "own_server", own_server)
    monkeypatch.setattr(job, "FrontendRounds", Rounds)
    monkeypatch.setattr(job, "free_bytes", lambda device: 2**40 if has_room else 2**20)
    with_http = [*(one for one in ARGUMENTS if one != "--no-http"), *SHAPE]
    for options in ([], [], ["--fresh"]):
        assert main([*with_http, *options]) == 0
        plan = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert plan["frontend"]["request_seconds"] == pytest.approx(
            0.001 * len(Rounds.counts) if has_room else 0.007
        )
    assert asked == ["a server of fp32" if has_room else "fp32"] * 2
    assert Rounds.counts == (["fp32"] * 3 * 2 if has_room else [])


@pytest.mark.parametrize("name", ["PREFILL_CHUNK", "MAX_CONCURRENT_REQUESTS", "REQUEST_TIMEOUT"])
def test_an_invalid_variable_of_the_server_is_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, "0")
    assert main([*ARGUMENTS, *SHAPE]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert name in line


def test_saved_step_times_that_are_no_use_are_measured_again(counted: list[str], cache: Path) -> None:
    assert main([*ARGUMENTS, *SHAPE]) == 0
    (file,) = cache.rglob("plans/**/fp32.json")
    saved = json.loads(file.read_text())
    useless: list[object] = [{}, None, {"cells": [{}]}, {**measured.calibration().as_dict(), "cells": []}]
    for number, figures in enumerate(useless, 1):
        file.write_text(json.dumps({**saved, "figures": figures}))
        assert main([*ARGUMENTS, *SHAPE]) == 0
        assert counted == ["fp32", "dynamic-int8", *["fp32"] * number]


def test_a_precision_named_twice_is_planned_once(
    counted: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main([*ARGUMENTS, *SHAPE, "--precisions", "fp32"]) == 0
    )  # the option a second time adds to the first
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert sorted(one["precision"] for one in plan["choices"]) == ["dynamic-int8", "fp32"]


def test_of_a_quantized_checkpoint_its_own_precision_is_planned(
    counted: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = str(tmp_path / "saved")
    assert main(["quantize", "--device", "cpu", "--method", "nf4", "--out", saved]) == 0
    assert main(["plan", "--device", "cpu", "--no-http", "--model", saved, *SHAPE]) == 0
    assert counted == ["nf4"]
    assert main([*ARGUMENTS, "--model", saved, *SHAPE]) == 2
    assert "is saved in nf4" in capsys.readouterr().err


def test_two_plans_take_turns_in_measuring(counted: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    codes, shown = list[int](), list[str]()
    other = threading.Thread(target=lambda: codes.append(main([*ARGUMENTS, *SHAPE])))

    def waits() -> bool:
        shown.append(capsys.readouterr().err)
        return "fp32: waiting for another process" in "".join(shown)

    with alone(lambda *_: None):
        other.start()
        wait_until(waits)
        assert not counted
    other.join()
    assert codes == [0]
    assert counted == ["fp32", "dynamic-int8"]
