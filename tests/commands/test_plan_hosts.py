"""What `bitdial plan` says of the host: how many like it are needed, and whether it was steady."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from server.__main__ import main
from server.host import cgroups
from server.planning import calibration, host_size
from server.planning.calibration import Calibrator
from tests.commands.test_plan_command import ARGUMENTS, SHAPE
from tests.planning import measured


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    measured.instead_of_measuring(monkeypatch)


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
