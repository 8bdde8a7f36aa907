"""A precision that can't be made of the model: unavailable from the start, with the reason."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from transformers import GPT2Config

from loaders import kernels
from loaders.base import Checkpoint
from server.app import create_app
from server.settings.server import Settings
from tests.checkpoints import VOCABULARY
from tests.conftest import Loads, wait_until
from tests.fakes import fake_checkpoint
from tests.routes.test_generate import PROMPT, greedy

pytestmark = pytest.mark.skipif(kernels.get() is None, reason=str(kernels.find()))
REASON = "transformer.h.0.attn.c_attn has 48 inputs, no multiple of 64"


def app_of(folder: Path, loads: Loads, **values: str) -> FastAPI:
    def narrow(*_: object) -> Checkpoint:
        config = GPT2Config(vocab_size=VOCABULARY, n_positions=256, n_embd=48, n_head=2, n_layer=1)
        return replace(fake_checkpoint(folder), config=config)

    return create_app(Settings(**{"device": "cpu", **values}), open_checkpoint=narrow, load=loads)  # type: ignore[arg-type]


@pytest.fixture
def client(tmp_path: Path, loads: Loads) -> Iterator[TestClient]:
    with TestClient(app_of(tmp_path, loads, precisions="fp32,nf4")) as client:
        wait_until(lambda: loads.names == ["fp32"])
        yield client


def test_its_state_has_the_reason(client: TestClient, loads: Loads) -> None:
    states = {one["name"]: one for one in client.get("/precisions").json()}
    assert {name for name, one in states.items() if one["state"] != "unavailable"} >= {"fp32", "int8"}
    for name in ("nf4", "int4", "qat-int8"):
        assert states[name]["state"] == "unavailable"
        assert REASON in states[name]["reason"]
    assert "nf4" not in client.get("/info").json()["precisions"]


def test_a_request_is_refused_or_falls_back(client: TestClient, loads: Loads) -> None:
    body = {"inputs": PROMPT, "max_new_tokens": 5, "precision": "nf4"}
    refused = client.post("/generate", json=body)
    assert refused.status_code == 409
    assert REASON in refused.json()["error"]
    served = client.post("/generate", json={**body, "fallback": True}).json()
    assert served["generated_text"] == greedy(5)
    assert (served["precision"], served["precision_requested"]) == ("fp32", "nf4")
    assert REASON in served["fallback_reason"]
    assert loads.names == ["fp32"]


def test_a_server_whose_default_it_is_ends(tmp_path: Path, loads: Loads) -> None:
    app = app_of(tmp_path, loads, precision="nf4", precisions="nf4")
    with TestClient(app):
        wait_until(lambda: app.state.lifecycle.fatal is not None)
        assert REASON in app.state.lifecycle.fatal
    assert loads.names == []
