"""The pre-commit hooks run what scripts/check runs, without a command of their own."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
REPOS: list[dict[str, Any]] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
HOOKS: list[dict[str, Any]] = [hook for repo in REPOS for hook in repo["hooks"]]
TOOLS = ["ruff", "mypy", "hadolint", "check-jsonschema", "compose-lint"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with scripts/check, and tools that record their calls; nothing is installed."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/check", tmp_path / "scripts/check")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name in ["scripts/install", *(f".venv/bin/{tool}" for tool in TOOLS)]:
        recorded = "" if name == "scripts/install" else f'echo "{name} $*" >> calls\n[ ! -f {name}-fails ]\n'
        (tmp_path / name).write_text(f"#!/bin/sh\n{recorded}")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def calls(checkout: Path, entry: str) -> list[str]:
    (checkout / "calls").unlink(missing_ok=True)
    subprocess.run(entry.split(), cwd=checkout, check=True, env={"PATH": os.environ["PATH"]})
    return (checkout / "calls").read_text().splitlines()


def test_the_hooks_make_exactly_the_calls_of_the_script(checkout: Path) -> None:
    expected = calls(checkout, "scripts/check")
    assert [call for hook in HOOKS for call in calls(checkout, hook["entry"])] == expected
    assert {Path(call.split()[0]).name for call in expected} == set(TOOLS)


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_that_fails_fails_its_hook_and_the_script(tool: str, checkout: Path) -> None:
    (checkout / f".venv/bin/{tool}-fails").touch()
    failed = [
        entry for entry in ["scripts/check", *(hook["entry"] for hook in HOOKS)] if fails(checkout, entry)
    ]
    assert "scripts/check" in failed
    assert len(failed) == (3 if tool == "ruff" else 2)  # ruff lints and formats


def fails(checkout: Path, entry: str) -> bool:
    return subprocess.run(entry.split(), cwd=checkout, env={"PATH": os.environ["PATH"]}).returncode != 0


def test_an_unknown_check_is_an_error(checkout: Path) -> None:
    assert fails(checkout, "scripts/check nothing")


def test_every_hook_is_local_and_has_files_in_the_repository() -> None:
    assert [repo["repo"] for repo in REPOS] == ["local"]
    names = [str(path.relative_to(ROOT)) for path in ROOT.iterdir()]
    for hook in HOOKS:
        assert set(hook) == {"id", "name", "entry", "language", "pass_filenames", "files"}
        assert hook["language"] == "system"
        assert hook["pass_filenames"] is False  # the script checks everything
        assert any(re.search(hook["files"], name) for name in names), hook["id"]
