"""Tests on a card. Without one they are skipped; with REHEARSED=1 they run on the CPU, their graphs recorded.

A rehearsal shows that the tests themselves are sound; what a card does, only a card shows.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import loaders
from loaders import runners
from loaders.base import ModelSpec
from loaders.captured_runner import CapturedRunner
from loaders.checkpoint import open_checkpoint
from server.bench.reference import load_reference
from tests import checkpoints
from tests.recorded_graphs import RecordedGraphs

PRECISIONS = ("fp32", "bf16", "fp16", "int8", "nf4", "fp4")
_ROOM = 10**10
Load = Callable[..., CapturedRunner]


@pytest.fixture(scope="session")
def rehearsed() -> bool:
    return os.environ.get("REHEARSED") == "1"


@pytest.fixture(scope="session")
def device(rehearsed: bool) -> str:
    return "cpu" if rehearsed else "cuda"


@pytest.fixture(autouse=True)
def _on_a_card(rehearsed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if rehearsed:
        monkeypatch.setattr(runners, "card_free", lambda _: _ROOM)
        monkeypatch.setattr(runners, "CudaGraphs", lambda _: RecordedGraphs())
    elif not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small checkpoints by family."""
    made = {"gpt2": checkpoints.gpt2, "llama": checkpoints.llama}
    return {name: checkpoints.save(make(), tmp_path_factory.mktemp(name)) for name, make in made.items()}


@pytest.fixture
def load(folders: dict[str, Path], rehearsed: bool) -> Iterator[Load]:
    """Runners of a family in a precision, as a server on the card would have them; closed afterwards."""
    loaded: list[CapturedRunner] = []

    def make(precision: str = "fp32", family: str = "gpt2", **values: Any) -> CapturedRunner:
        spec = ModelSpec(open_checkpoint(str(folders[family])), device="cuda", **{"slots": 16, **values})
        if rehearsed:
            if (precision, family) != ("fp32", "gpt2"):
                pytest.skip("one is enough, and bitsandbytes' kernels for a CPU can't be recorded")
            plain = ModelSpec(spec.checkpoint, slots=spec.slots)
            runner = runners.runner_for(load_reference(precision, plain), spec)
        else:
            able = loaders.availability(precision, "cuda")
            if not able.ok:
                pytest.skip(str(able.reason))
            runner = loaders.load(precision, spec).runner
        assert isinstance(runner, CapturedRunner)
        loaded.append(runner)
        return runner

    yield make
    for runner in loaded:
        runner.close()
