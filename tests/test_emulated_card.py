"""The tests of a card, and the check of one, on a card that is emulated: every path for a GPU, real numbers.

In processes of their own: a process can't lose a card again.
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
from tests.http.test_process import ROOT

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA's own kernels"),
]
FEW = [
    "tests/emulated_card/test_rules.py",
    "tests/gpu/test_steps.py::test_captured_and_equal_to_launched_to_the_last_bit[nf4-gpt2]",
    "tests/gpu/test_steps.py::test_captured_and_equal_to_launched_to_the_last_bit[int8-gpt2]",
    "tests/gpu/test_steps.py::test_a_row_is_the_same_alone_and_among_fifteen[fp32-llama]",
    "tests/gpu/test_steps.py::test_a_capture_that_fails_leaves_plain_steps_and_the_next_one_captures",
    "tests/gpu/test_steps.py::test_what_is_told_is_what_was_taken_and_closing_gives_it_back",
    "tests/gpu/test_serving.py::test_the_device_chooses_what_the_host_would",
    "tests/gpu/test_serving.py::test_out_of_memory_fails_the_request_it_befell_and_memory_is_back",
    "tests/gpu/test_serving.py::test_clients_that_go_leave_their_slots_as_new",
]


def emulated(*command: str, cards: int = 1) -> subprocess.CompletedProcess[str]:
    started = {**os.environ, **environment(), "EMULATED_CARDS": str(cards)}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=started, capture_output=True, text=True)


def check(out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit status of ``gpu_check`` with tiny models, and what it found."""
    done = emulated("scripts/gpu_check", "--quick", "--seconds", "1800", "--out", str(out), *arguments)
    return done.returncode, json.loads(out.read_text())


def test_the_rules_of_a_card_and_what_matters_most_on_it() -> None:
    done = emulated("-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *FEW)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "skipped" not in done.stdout


def test_a_model_that_one_card_can_not_hold() -> None:
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
def test_all_that_is_tested_on_a_card() -> None:
    done = emulated("-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu")
    assert done.returncode == 0, done.stdout[-4000:]
    assert "skipped" not in done.stdout


@pytest.mark.slow
def test_the_check_of_a_card_finds_nothing_wrong(tmp_path: Path) -> None:
    status, found = check(tmp_path / "gpu.json", "--parts", "correctness,speed,continuous,http,xl,steady")
    assert (status, found["failures"], found["skipped"]) == (0, [], [])
    assert [one["precision"] for one in found["correctness"]] == list(PRECISIONS)
    for one in found["correctness"]:
        assert (one["captured"], one["equals_eager"], one["isolated"]) == (True, True, True), one
        assert one["memory"]["told"] == pytest.approx(one["memory"]["reserved"], rel=0.01)
        assert one["memory"]["left_behind"] < 10_000
    assert all(one["runner"]["captured"] for one in found["loaded"])
    assert not any(one["errors"] for one in found["http"])
