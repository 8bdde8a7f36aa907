"""The output of `bitdial serve`: its address and an example, or one line with the error."""

from pathlib import Path

import pytest
from pydantic import SecretStr

from server.__main__ import main
from server.commands import serve
from server.settings.server import Settings
from tests import checkpoints


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
    serve._announce(Settings(host=host), 8099)
    answer = capsys.readouterr().out
    assert f"listening on {address}\n" in answer
    (curl,) = (line for line in answer.splitlines() if "curl" in line)
    assert curl.startswith(f"  curl {address}/generate -H 'Content-Type")


def test_the_example_needs_the_key_and_does_not_show_it(capsys: pytest.CaptureFixture[str]) -> None:
    serve._announce(Settings(api_key=SecretStr("opensesame")), 8099)
    answer = capsys.readouterr().out
    assert '-H "Authorization: Bearer $API_KEY"' in answer
    assert "opensesame" not in answer


def test_a_model_without_a_tokenizer_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints.gpt2().save_pretrained(tmp_path / "mute")
    assert main(["serve", "--model", str(tmp_path / "mute")]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "bitdial serve: mute has no usable tokenizer"
