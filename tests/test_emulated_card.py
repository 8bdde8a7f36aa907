"""Runs the GPU tests and ``gpu_check`` on an emulated card: every GPU path, with real numbers.

In subprocesses, because emulation can't be undone within a process.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from server.bench.gpu.options import PRECISIONS
from tests.emulated_card import environment
from tests.forked import ROOT

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA"),
]
FEW = [
    "tests/emulated_card/test_rules.py",
    "tests/gpu/test_steps.py::test_replayed_steps_equal_launched_ones_bit_for_bit[nf4-gpt2]",
    "tests/gpu/test_steps.py::test_replayed_steps_equal_launched_ones_bit_for_bit[int8-gpt2]",
    "tests/gpu/test_steps.py::test_a_row_is_the_same_alone_and_among_fifteen[fp32-llama]",
    "tests/gpu/test_steps.py::test_a_failed_capture_falls_back_and_the_next_load_captures",
    "tests/gpu/test_steps.py::test_reported_bytes_equal_allocated_ones_and_closing_frees_them",
    "tests/gpu/test_serving.py::test_the_device_sampler_picks_the_tokens_of_the_host_sampler",
    "tests/gpu/test_serving.py::test_out_of_memory_fails_its_request_only_and_memory_is_freed",
    "tests/gpu/test_serving.py::test_a_slot_is_clean_after_its_client_disconnects",
]


def emulated(*command: str, cards: int = 1) -> subprocess.CompletedProcess[str]:
    started = {**os.environ, **environment(), "EMULATED_CARDS": str(cards)}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=started, capture_output=True, text=True)


def check(out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit status of ``gpu_check`` with tiny models, and its JSON."""
    done = emulated("scripts/gpu_check", "--quick", "--seconds", "1800", "--out", str(out), *arguments)
    return done.returncode, json.loads(out.read_text())


def test_the_rules_of_a_card_and_the_main_paths() -> None:
    done = emulated("-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *FEW)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "skipped" not in done.stdout


def test_a_model_larger_than_one_card() -> None:
    done = emulated(
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "tests/emulated_card/test_two_cards.py",
        cards=2,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "skipped" not in done.stdout


@pytest.mark.slow
def test_every_gpu_test() -> None:
    done = emulated("-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu")
    assert done.returncode == 0, done.stdout[-4000:]
    assert "skipped" not in done.stdout


@pytest.mark.slow
def test_gpu_check_finds_no_failure(tmp_path: Path) -> None:
    status, found = check(tmp_path / "gpu.json", "--parts", "correctness,speed,continuous,http,xl,steady")
    assert (status, found["failures"], found["skipped"]) == (0, [], [])
    assert [one["precision"] for one in found["correctness"]] == list(PRECISIONS)
    for one in found["correctness"]:
        assert (one["captured"], one["equals_eager"], one["isolated"]) == (True, True, True), one
        assert one["memory"]["told"] == pytest.approx(one["memory"]["reserved"], rel=0.01)
        assert one["memory"]["left_behind"] < 10_000
    assert all(one["runner"]["captured"] for one in found["loaded"])
    assert not any(one["errors"] for one in found["http"])
