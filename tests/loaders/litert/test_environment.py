"""The converter's process: its environment, what it reports, and how it fails."""

from pathlib import Path

import pytest

import loaders
from loaders.base import ignore_progress
from loaders.errors import CheckpointError
from loaders.litert import environment
from loaders.litert.processes import ConverterUnavailable

SEEN: list[tuple[str, int, int]] = []


def record(stage: str, current: int, total: int) -> None:
    SEEN.append((stage, current, total))


@pytest.fixture
def converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A complete environment whose interpreter is a script, to be written by the test."""
    monkeypatch.setenv(environment.FOLDER, str(tmp_path / "venv"))
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "complete").touch()
    return tmp_path / "venv" / "bin" / "python"


def write(script: Path, text: str) -> None:
    script.write_text(f"#!/bin/sh\n{text}\n")
    script.chmod(0o755)


def test_progress_and_errors_of_the_converter_are_passed_on(converter: Path, tmp_path: Path) -> None:
    write(converter, "echo noise; echo 'bitdial-progress [\"calibrating\", 3, 8]'")
    environment.run("any.module", {"a": 1}, tmp_path, record)
    assert ("calibrating", 3, 8) in SEEN
    write(converter, "echo 'bitdial-error \"one of its dimensions is 251\"'; exit 1")
    with pytest.raises(CheckpointError, match=r"^one of its dimensions is 251$"):
        environment.run("any.module", {}, tmp_path, ignore_progress)


def test_a_converter_that_dies_is_one_clear_line(converter: Path, tmp_path: Path) -> None:
    write(converter, "kill -9 $$")
    with pytest.raises(ConverterUnavailable, match=r"can't be used \(exit code -9\)$"):
        environment.run("any.module", {}, tmp_path, ignore_progress)


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loaders.precisions.litert.find_spec", lambda _: None)
    able = loaders.availability("litert-int8", "cpu")
    assert (able.reason, able.install) == ("ai-edge-litert is not installed", "pip install 'bitdial[litert]'")
    assert "CPU" in (loaders.availability("litert-int8", "cuda").reason or "")


def test_an_environment_of_the_user_needs_an_interpreter_alone(converter: Path, tmp_path: Path) -> None:
    (tmp_path / "venv" / "complete").unlink()
    write(converter, "exit 0")
    assert environment.ensure(ignore_progress) == converter


def test_an_environment_that_the_user_names_is_never_installed() -> None:
    able = loaders.availability("litert-int8", "cpu")
    assert able.reason == "BITDIAL_LITERT_CONVERTER names no environment with LiteRT's converter"
    with pytest.raises(ConverterUnavailable, match="names no environment"):
        environment.ensure(ignore_progress)
