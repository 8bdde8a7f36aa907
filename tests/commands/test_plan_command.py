import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import loaders
from server.__main__ import main
from server.host import cgroups
from server.planning import calibration, host_size, job, planner
from server.planning.calibration import Calibrator
from server.planning.store import alone
from server.planning.workload import Frontend, Replica
from tests.conftest import wait_until
from tests.planning import measured

ARGUMENTS = ["plan", "--device", "cpu", "--precisions", "fp32,dynamic-int8", "--no-http"]
SHAPE = ["--prompt", "32", "--tokens", "16", "--requests-per-second", "20"]


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces measuring by known step times; loading is real. Records what is measured."""
    names: list[str] = []
    monkeypatch.setattr(planner, "_MOST", 300)
    monkeypatch.setattr(planner, "_HALVINGS", 6)

    async def measure(self: Calibrator, progress: object) -> calibration.Calibration:
        model = self._model
        names.append(model.precision)
        model.close()
        return measured.calibration(model.precision)

    monkeypatch.setattr(Calibrator, "measure", measure)
    return names


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


@pytest.fixture
def host_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets this host's memory, or its container's limit, and its cores."""

    def limited(limit: int, cores: int = 1) -> None:
        monkeypatch.setattr(cgroups, "memory", lambda: (limit, limit))
        monkeypatch.setattr(host_size, "default_threads", lambda: cores)

    return limited


def test_replicas_that_exceed_the_hosts_memory_are_named_with_the_hosts_they_need(
    host_of: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    busy = [*ARGUMENTS, *SHAPE, "--requests-per-second", "200", "--threads", "1", "--json", str(file)]
    host_of(25_000_000, cores=16)  # a replica has 10 MB and its cache: two fit
    assert main(busy) == 0
    best = json.loads(file.read_text())["choices"][0]
    assert best["replicas"] > 2
    assert best["all_replicas_bytes"] == best["replicas"] * best["memory_bytes"] > 22_500_000
    assert (best["hosts"], best["fits_this_host"]) == (-(-best["replicas"] // 2), False)
    text = capsys.readouterr().out
    assert "▸ All replicas together don't fit this host, which has 22 MB for them:" in text
    sums = f"{best['precision']} {best['all_replicas_bytes'] / 1e6:.0f} MB ({best['hosts']} hosts)"
    assert sums in " ".join(text.split())
    heading, row = (line.split() for line in text.splitlines() if line.startswith(("precision", "fp32")))
    assert "hosts" in heading
    assert str(best["hosts"]) in row

    host_of(2**40, cores=100)
    assert main(busy) == 0
    best = json.loads(file.read_text())["choices"][0]
    assert (best["hosts"], best["fits_this_host"]) == (1, True)
    assert "don't fit" not in capsys.readouterr().out


def test_a_host_has_no_more_replicas_than_their_threads_have_cores(
    host_of: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    host_of(2**40, cores=4)
    assert main([*ARGUMENTS, *SHAPE, "--requests-per-second", "200", "--threads", "2"]) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert plan["host_size"]["side_by_side"] == 2
    assert [one["hosts"] for one in plan["choices"]] == [-(-one["replicas"] // 2) for one in plan["choices"]]


def test_a_replica_that_is_larger_than_the_host_is_not_planned(
    host_of: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    host_of(10_000_000)
    assert main([*ARGUMENTS, *SHAPE]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "with a batch of 1 it needs 10 MB, and this host has 9 MB for it" in text
    assert "No precision meets the objectives on this host." in text


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


def test_http_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    async def measure(settings: object, precision: str, times: object, replica: Replica) -> Frontend:
        asked.append(precision)
        return Frontend(0.001, 0.0, 0.0)

    monkeypatch.setattr(job, "measure_frontend", measure)
    with_http = [one for one in ARGUMENTS if one != "--no-http"]
    assert main([*with_http, *SHAPE]) == 0
    assert main([*with_http, *SHAPE]) == 0
    assert asked == ["fp32"]


@pytest.mark.parametrize("name", ["PREFILL_CHUNK", "MAX_CONCURRENT_REQUESTS", "REQUEST_TIMEOUT"])
def test_an_invalid_variable_of_the_server_is_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, "0")
    assert main([*ARGUMENTS, *SHAPE]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert name in line


@pytest.mark.parametrize(
    "figures", [{}, None, {"cells": [{}]}, {**measured.calibration().as_dict(), "cells": []}]
)
def test_saved_step_times_that_are_no_use_are_measured_again(
    figures: object, counted: list[str], cache: Path
) -> None:
    assert main([*ARGUMENTS, *SHAPE]) == 0
    (file,) = cache.rglob("plans/**/fp32.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "figures": figures}))
    assert main([*ARGUMENTS, *SHAPE]) == 0
    assert counted == ["fp32", "dynamic-int8", "fp32"]


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


@pytest.mark.parametrize(
    ("noise", "said", "json_name", "ratio"),
    [
        ([1.0, 1.2, 1.0], "ran, this host's speed changed by 20% within minutes", "drift", 1.2),
        ([1.0] * 30 + [6.0], "were measured, other work disturbed this host", "noise_p99", 6.0),
    ],
)
def test_a_host_that_was_not_steady_is_told(
    noise: list[float], said: str, json_name: str, ratio: float,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    async def measure(self: Calibrator, progress: object) -> calibration.Calibration:
        self._model.close()
        return measured.calibration(self._model.precision, noise)

    monkeypatch.setattr(Calibrator, "measure", measure)
    goals = ["--ttft-slo", "500", "--itl-slo", "50", "--fresh"]
    assert main([*ARGUMENTS, *SHAPE, *goals]) == 0
    text = capsys.readouterr().out
    assert said in " ".join(text.split())
    found = json.loads(text.splitlines()[-1])
    assert found[json_name]["fp32"] == pytest.approx(ratio, rel=0.01)
    assert (found["drift"]["fp32"] > 1.1) == (json_name == "drift")
