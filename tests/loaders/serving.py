"""What every precision guarantees behind the HTTP API."""

from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from loaders.base import ModelSpec
from loaders.checkpoint import open_checkpoint
from server.app import create_app
from server.settings.server import Settings
from tests import checkpoints
from tests.checkpoints import byte_tokenizer
from tests.conftest import wait_until
from tests.loaders.contract import greedy, load, report_of


class ServingContract:
    """Behind the HTTP API the tokens are the runner's, and the figures in ``/stats`` the model's."""

    def test_it_is_served_and_measured(self, precision: str, tmp_path: Path) -> None:
        folder = checkpoints.save(checkpoints.gpt2(), tmp_path / "tiny")
        text = checkpoints.calibration_text(tmp_path)
        spec = ModelSpec(open_checkpoint(str(folder)), slots=2, calibration=text, training_steps=2)
        model = load(precision, spec)
        ids = byte_tokenizer().encode("the rain")
        expected = greedy(model, {0: ids}, 6)[0]
        options = {"max_new_tokens": 6, "ignore_eos": True, "details": True}
        settings = Settings(
            model_id=str(folder), precision=precision, precisions=precision, device="cpu", calibration=text
        )
        app = create_app(settings)
        with TestClient(app) as client:
            wait_until(lambda: app.state.pool.state(precision).state == "loaded")
            reply = client.post("/generate", json={"inputs": "the rain", "parameters": options}).json()
            stats: Any = client.get("/stats?layers=true").json()["precisions"][precision]
        assert [token["id"] for token in reply["details"]["tokens"]] == expected
        assert stats["memory"]["weights_bytes"] == model.footprint.weights_bytes
        assert stats["layers"]["quantized_names"] == list(model.footprint.quantized)
        assert [layer["format"] for layer in stats["proof"]] == [
            x.format for x in report_of(model, spec).layers
        ]
