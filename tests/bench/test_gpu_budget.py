"""The time budget of ``gpu_check``, and its other processes."""

import json
import os
import pickle
import signal
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path

import pytest

from loaders.base import Availability
from loaders.errors import PrecisionUnavailable
from server.bench.gpu import budget, check, kernels, models, speed
from server.bench.gpu.budget import another_process
from server.bench.gpu.options import QUICK
from tests.bench.test_gpu_check import REHEARSAL, rows


def test_a_hanging_part_is_stopped_and_earlier_results_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left: list[float] = []

    def hang(*_: object) -> None:
        left.append(signal.setitimer(signal.ITIMER_REAL, 0.1)[0])  # the rest of the time passes at once
        time.sleep(600)

    monkeypatch.setattr(speed, "measure", hang)
    file = tmp_path / "gpu.json"
    arguments = ["--precisions", "fp32", "--parts", "correctness,speed,steady", "--seconds", "1800"]
    assert check.main([*REHEARSAL, *arguments, "--out", str(file)]) == 2
    assert 0 < left[0] < 1800 - budget._GRACE
    document = json.loads(file.read_text())
    assert not document["complete"]
    assert len(document["correctness"]) == 1
    assert document["skipped"][-1]["why"] == "the time was over"
    assert not rows(document, speed.STEADY)


def test_parts_beyond_the_time_limit_are_skipped(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    arguments = ["--device", "cpu", "--parts", "speed,xl", "--seconds", "20", "--out", str(file)]
    folder = models.make(QUICK.small, tmp_path / "model", "cpu", None)
    assert check.main([str(folder), *arguments, "--precisions", "fp32,nf4"]) in (0, 2)
    document = json.loads(file.read_text())
    assert document["rows"] == []
    assert {one["what"] for one in document["skipped"]} >= {"speed fp32", "speed nf4", "xl"}


def test_a_crash_in_a_subprocess_is_isolated() -> None:
    with another_process() as process, pytest.raises(BrokenProcessPool):
        process.submit(os._exit, 3).result(60)
    refused = PrecisionUnavailable("nf4", Availability("there is no card"))
    with another_process() as process:
        assert process.submit(asdict, kernels.StepCost(7, 0.5, 8, 256)).result(60)["kernels"] == 7
        assert process.submit(pickle.loads, pickle.dumps(refused)).result(60).precision == "nf4"
        process.submit(time.sleep, 600)
        began = time.monotonic()
    assert time.monotonic() - began < 60
