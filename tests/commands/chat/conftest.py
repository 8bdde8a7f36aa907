"""Conversations with a real server in this process, whose model is a fake one with a chat template."""

import io
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from server.__main__ import main
from tests.conftest import serving
from tests.routes.openai.test_openai import TEMPLATE


@dataclass
class Talk:
    """What a conversation printed, and its exit code."""

    out: str
    err: str
    code: int


@pytest.fixture
def template(tmp_path: Path) -> Path:
    file = tmp_path / "template.jinja"
    file.write_text(TEMPLATE)
    return file


@pytest.fixture
def serve(make_app: Callable[..., FastAPI]) -> Iterator[Callable[..., str]]:
    """Serves with given settings and returns the address."""
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(serving(make_app(**settings)))


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Talk]:
    """Runs ``bitdial chat`` with lines on standard input."""

    def run(*typed: str | bytes, **options: Any) -> Talk:
        flags = [
            text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))
        ]
        lines = b"".join(b"%b\n" % (line if isinstance(line, bytes) else line.encode()) for line in typed)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
        capfd.readouterr()
        code = main(["chat", *flags])
        printed = capfd.readouterr()
        return Talk(printed.out, printed.err, code)

    return run
