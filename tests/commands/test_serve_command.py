"""The output of `bitdial serve`: its address and an example, or one line with the error."""

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import SecretStr

from loaders.checkpoint import open_checkpoint
from server.__main__ import main
from server.commands import serve
from server.report.background import Reports
from server.served_model import Wanted
from server.settings.server import Settings
from tests import checkpoints
from tests.routes.test_report_route import keep_report


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "http://127.0.0.1:8099"),
        ("0.0.0.0", "http://127.0.0.1:8099"),
        ("::", "http://[::1]:8099"),
        ("::1", "http://[::1]:8099"),
        ("example.org", "http://example.org:8099"),
    ],
)
def test_the_address_can_be_pasted(host: str, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    serve._announce(Settings(host=host), 8099, ["bundled"])
    printed = capsys.readouterr().out
    assert f"listening on {address}\n" in printed
    assert f"open {address}/ in a browser\n" in printed
    (curl,) = (line for line in printed.splitlines() if "curl" in line)
    assert curl.startswith(f"  curl {address}/generate -H 'Content-Type")


def test_the_example_needs_the_key_and_does_not_show_it(capsys: pytest.CaptureFixture[str]) -> None:
    serve._announce(Settings(api_key=SecretStr("opensesame")), 8099, ["bundled"])
    printed = capsys.readouterr().out
    assert '-H "Authorization: Bearer $API_KEY"' in printed
    assert "opensesame" not in printed


def test_a_model_without_a_tokenizer_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints.gpt2().save_pretrained(tmp_path / "mute")
    assert main(["serve", "--model", str(tmp_path / "mute")]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "bitdial serve: mute has no usable tokenizer"


def test_app_and_process_hold_one_settings_in_which_auto_is_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(precisions="fp32", device="cpu")
    reports = Reports(settings, open_checkpoint(settings.model_id, settings.revision))
    asyncio.run(reports.find_subject())
    keep_report(reports)
    held: list[Settings] = []

    def create_app(settings: Settings, first: Wanted, **_: Any) -> FastAPI:
        assert first.default_choice is not None
        assert first.settings is settings
        held.append(settings)
        return FastAPI()

    class Process:
        def __init__(self, app: FastAPI, settings: Settings, **_: Any) -> None:
            held.append(settings)

        def serve_forever(self) -> int:
            return 0

    monkeypatch.setattr("server.app.create_app", create_app)
    monkeypatch.setattr("server.http.server.Process", Process)
    monkeypatch.setattr("os._exit", sys.exit)
    with pytest.raises(SystemExit, match="0"):
        main(["serve", "--precision", "auto", "--auto-prefer", "quality", "--device", "cpu"])
    in_app, in_process = held
    assert in_app is in_process
    assert in_app.precision == "fp32"
