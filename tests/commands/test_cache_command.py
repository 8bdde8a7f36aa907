"""``bitdial cache``: what is listed, what is removed, and one line for every mistake."""

import json
from pathlib import Path
from typing import Any

import pytest

from loaders.artifacts import Recipe, prepare
from loaders.artifacts.in_use import release
from loaders.artifacts.recipe import KEY
from loaders.base import ModelSpec, Progress, ignore_progress
from loaders.checkpoint import open_checkpoint
from server.__main__ import main
from tests import checkpoints


def write(folder: Path, progress: Progress) -> None:
    (folder / "weights").write_bytes(bytes(2_000_000))


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    folder = checkpoints.save(checkpoints.gpt2(), tmp_path / "tiny")
    return ModelSpec(open_checkpoint(str(folder)), artifacts=tmp_path / "made")


def make(spec: ModelSpec, method: str, group: int) -> Path:
    folder = prepare(spec, Recipe(method, {"format": 1, "group": group}), write, ignore_progress)
    release(folder)
    return folder


def cache(spec: ModelSpec, *arguments: str) -> int:
    return main(["cache", "--artifacts", str(spec.artifacts), *arguments])


def listed(spec: ModelSpec, out: Path) -> list[dict[str, Any]]:
    assert cache(spec, "--json", str(out)) == 0
    found: list[dict[str, Any]] = json.loads(out.read_text())
    return found


def test_the_list(spec: ModelSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, other = make(spec, "int4", 1), make(spec, "onnx-int8", 1)
    found = {one["name"]: one for one in listed(spec, tmp_path / "list.json")}
    assert found.keys() == {folder.name, other.name}
    one = found[folder.name]
    assert (one["method"], one["model"], one["kind"], one["in_use"]) == ("int4", "tiny", "made", False)
    assert 2_000_000 < one["bytes"] < 2_010_000
    printed = capsys.readouterr().out
    (line,) = (line for line in printed.splitlines() if line.startswith(folder.name))
    assert line.split()[1:3] == ["tiny", "2.0"]
    assert "2 in all, 4.0 MB" in printed
    assert str(spec.artifacts) in printed


def test_an_empty_cache(spec: ModelSpec, capsys: pytest.CaptureFixture[str]) -> None:
    assert cache(spec, "--artifacts-limit", "3GB") == 0
    assert capsys.readouterr().out == f"0 in all, 0.0 MB of 3,000.0 MB\nin {spec.artifacts}\n"


@pytest.mark.parametrize(("names", "left"), [("int4", 1), ("all", 0), ("onnx-int8,int4", 0)])
def test_removal(spec: ModelSpec, names: str, left: int, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [make(spec, "int4", 1), make(spec, "int4", 2), make(spec, "onnx-int8", 1)]
    assert spec.artifacts is not None
    of_gone_files = spec.artifacts / f"int4-{'0' * KEY}.lock"
    of_gone_files.touch()
    assert cache(spec, "--remove", names) == 0
    assert not of_gone_files.exists()
    assert len(list(spec.artifacts.iterdir())) == 3 * left, "each with two files of locks"
    assert sum(folder.exists() for folder in folders) == left
    assert f"removed {3 - left}, {2.0 * (3 - left):.1f} MB" in capsys.readouterr().out


def test_removal_of_one(spec: ModelSpec) -> None:
    one, other = make(spec, "int4", 1), make(spec, "int4", 2)
    assert cache(spec, "--remove", one.name) == 0
    assert (one.exists(), other.exists()) == (False, True)


def test_what_is_in_use_stays(spec: ModelSpec, capsys: pytest.CaptureFixture[str]) -> None:
    used = prepare(spec, Recipe("int4", {"format": 1}), write, ignore_progress)
    free = make(spec, "int4", 2)
    assert cache(spec, "--remove", "all") == 1
    assert (used.exists(), free.exists()) == (True, False)
    assert capsys.readouterr().err == f"bitdial cache: {used.name} is in use, or can't be removed\n"
    release(used)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--remove", "int3"], "--remove: 'int3' is not in the cache"),
        (["--remove", "int4,int3"], "--remove: 'int3' is not in the cache"),
        (["--remove", ","], "--remove: it names nothing"),
        (["--artifacts-limit", "much"], "--artifacts-limit (or ARTIFACTS_LIMIT): 'much' is not a size"),
    ],
)
def test_a_mistake_is_one_line(
    spec: ModelSpec, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(spec, "int4", 1)
    assert cache(spec, *arguments) == 2
    assert capsys.readouterr().err.startswith(f"bitdial cache: {message}")
    assert folder.exists()
