"""The quantization report in ``/stats?layers=true`` and ``bitdial precisions --layers``."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from transformers import GPT2Config, GPT2LMHeadModel

import loaders
from loaders.base import ModelSpec
from loaders.checkpoint import open_checkpoint
from loaders.layer_errors import layer_errors
from server.__main__ import main
from server.app import create_app
from server.settings.server import Settings
from tests import checkpoints
from tests.conftest import wait_until


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow layer and a large vocabulary: the head, which int8 does not quantize, is most of the model."""
    config = GPT2Config(vocab_size=4000, n_positions=64, n_embd=64, n_layer=1, n_head=2)
    return checkpoints.save(GPT2LMHeadModel(config), tmp_path_factory.mktemp("headstrong"))


@pytest.fixture
def client(folder: Path) -> Iterator[TestClient]:
    app = create_app(Settings(model_id=str(folder), precisions="fp32,int8", device="cpu", threads=1))
    with TestClient(app) as found:
        wait_until(lambda: app.state.pool.state("int8").state == "loaded")
        yield found


def test_every_layer_of_a_loaded_model_is_reported(client: TestClient, folder: Path) -> None:
    answer: Any = client.get("/stats?layers=true").json()["precisions"]
    spec = ModelSpec(open_checkpoint(str(folder)), slots=1)
    expected = layer_errors(loaders.load("int8", spec), spec)
    assert expected is not None
    proof = {layer["name"]: layer for layer in answer["int8"]["proof"]}
    assert list(proof) == [layer.name for layer in expected.layers]
    for layer in expected.layers:
        found = proof[layer.name]
        assert (found["kind_before"], found["nbytes"]) == (layer.kind_before, layer.nbytes)
        assert found["relative_error"] == pytest.approx(layer.relative_error, rel=0.01)
    assert proof["transformer.h.0.mlp.c_fc"]["sqnr_db"] > 30
    assert answer["nf4"]["proof"] is None
    assert client.get("/stats?layers=true").json()["precisions"]["int8"]["proof"] == answer["int8"]["proof"]
    assert "proof" not in client.get("/stats").json()["precisions"]["int8"]
    assert client.get("/stats?layers=perhaps").status_code == 422


def test_a_quantization_warning_is_reported_and_logged(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(Settings(model_id=str(folder), precisions="fp32,int8", device="cpu", threads=1))
    with caplog.at_level(logging.WARNING), TestClient(app) as client:
        wait_until(lambda: app.state.pool.state("int8").state == "loaded")
        answer = client.get("/stats").json()["precisions"]
    expected = (
        "int8 has quantized only 16% of this model's linear weights: expect little of its memory and speed"
    )
    assert answer["int8"]["warning"] == expected
    assert answer["int8"]["layers"]["quantized_share"] == pytest.approx(0.161, abs=0.001)
    assert answer["fp32"]["warning"] is answer["nf4"]["warning"] is None
    assert expected in caplog.messages


def test_in_the_terminal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["precisions", "--model", str(folder), "--layers", "int8,fp32"]) == 0
    printed = capsys.readouterr().out
    assert "int8: 16.1% of the linear weights quantized" in printed
    assert "WARNING: int8 has quantized only 16%" in printed
    row = next(line for line in printed.splitlines() if line.startswith("transformer.h.0.mlp.c_fc"))
    assert "Conv1D" in row
    assert "256 × 64" in row
    assert "fp32: 0.0% of the linear weights quantized" in printed


def test_layers_of_an_unknown_precision(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["precisions", "--layers", "int3"]) == 2
    assert "unknown precision 'int3'" in capsys.readouterr().err
