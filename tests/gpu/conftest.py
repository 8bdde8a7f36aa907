"""GPU tests, skipped without a GPU; tests/test_emulated_card.py runs them on an emulated card."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import loaders
from loaders.base import ModelSpec
from loaders.checkpoint import open_checkpoint
from loaders.cuda.graph_runner import GraphRunner
from tests import checkpoints

PRECISIONS = ("fp32", "bf16", "fp16", "int8", "nf4", "fp4")
Load = Callable[..., GraphRunner]


@pytest.fixture(autouse=True)
def _on_a_card() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small checkpoints by family."""
    made = {"gpt2": checkpoints.gpt2, "llama": checkpoints.llama}
    return {name: checkpoints.save(make(), tmp_path_factory.mktemp(name)) for name, make in made.items()}


@pytest.fixture
def load(folders: dict[str, Path]) -> Iterator[Load]:
    """Loads Runners of a family in a precision with a server's settings; closes them afterwards."""
    loaded: list[GraphRunner] = []

    def make(precision: str = "fp32", family: str = "gpt2", **values: Any) -> GraphRunner:
        able = loaders.availability(precision, "cuda")
        if not able.ok:
            pytest.skip(str(able.reason))
        spec = ModelSpec(open_checkpoint(str(folders[family])), device="cuda", **{"slots": 16, **values})
        runner = loaders.load(precision, spec).runner
        assert isinstance(runner, GraphRunner)
        loaded.append(runner)
        return runner

    yield make
    for runner in loaded:
        runner.close()
