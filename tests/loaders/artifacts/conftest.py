"""A small model, with a cache of made files of its own."""

from pathlib import Path

import pytest

from loaders.base import ModelSpec
from loaders.checkpoint import open_checkpoint
from tests import checkpoints


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    folder = checkpoints.save(checkpoints.gpt2(), tmp_path / "tiny")
    return ModelSpec(open_checkpoint(str(folder)), artifacts=tmp_path / "artifacts")
