"""Errors of `bitdial generate`; tests/http/test_process.py tests its output."""

from pathlib import Path

import pytest

import loaders
from loaders.base import LoadedModel
from server.__main__ import main
from tests import checkpoints
from tests.fakes import FakeRunner, fake_model


def test_a_generation_that_fails_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = FakeRunner(slots=1)
    runner.poison = lambda logits, slots: logits * float("nan")

    def load(*_: object) -> LoadedModel:
        return fake_model(runner=runner)

    monkeypatch.setattr(loaders, "load", load)
    assert main(["generate", "abc"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "bitdial generate: the model returned logits that are not numbers"
    ]


def test_ctrl_c_while_loading_ends_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The load runs outside the event loop, which would delay the interrupt until its end."""
    import asyncio

    def load(*_: object) -> LoadedModel:
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        raise KeyboardInterrupt

    monkeypatch.setattr(loaders, "load", load)
    assert main(["generate", "abc"]) == 130


def test_a_token_that_the_model_lacks_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints.gpt2().save_pretrained(tmp_path)
    tokenizer = checkpoints.byte_tokenizer()
    tokenizer.add_tokens([f"<extra{i}>" for i in range(100)])
    tokenizer.save_pretrained(tmp_path)
    assert main(["generate", "a <extra99>", "--model", str(tmp_path)]) == 2
    assert "the model has no token 363" in capsys.readouterr().err
