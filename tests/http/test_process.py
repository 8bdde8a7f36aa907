"""The process as a supervisor and a user run it: subprocesses of the `bitdial` command."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests import checkpoints, forked
from tests.forked import ROOT, environment


def bitdial(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "server", *arguments],
        cwd=ROOT, env=environment() | variables, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save(checkpoints.gpt2(), tmp_path_factory.mktemp("models") / "tiny")


def test_a_port_in_use_is_one_clear_failure(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = forked.bitdial("serve", "--model", str(folder), "--port", str(taken.getsockname()[1]))
    assert done.returncode == 1
    assert "address already in use" in done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_usage_is_one_line_and_code_2() -> None:
    done = forked.bitdial("serve", "--port", "abc")
    assert done.returncode == 2
    assert re.fullmatch(r"bitdial serve: --port \(or PORT\): .*\n", done.stderr)


def test_generate_in_the_terminal(folder: Path) -> None:
    done = bitdial("generate", "abc", "--model", str(folder), "--max-new-tokens", "5", "--precision", "4bit")
    assert done.returncode == 0
    assert done.stdout.startswith("abc")
    assert re.search(r"\[nf4: \d tokens, first after", done.stderr)


def test_generate_continues_files_and_prints_json(folder: Path, tmp_path: Path) -> None:
    files = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for file, text in zip(files, ("abc\n", "xyz"), strict=True):
        file.write_text(text)
    options = ("--model", str(folder), "--max-new-tokens", "3", "--file", ",".join(map(str, files)))
    shown, told = forked.bitdial("generate", *options), forked.bitdial("generate", *options, "--json")
    first, second = map(json.loads, told.stdout.splitlines())
    assert [first["file"], second["file"]] == [*map(str, files)]
    assert (first["prompt_tokens"], first["generated_tokens"], len(first["token_ids"])) == (3, 3, 3)
    assert told.stderr == ""  # quiet: it is no terminal
    one, two = (f"==> {file} <==" for file in files)
    assert shown.stdout == f"{one}\nabc{first['generated_text']}\n\n{two}\nxyz{second['generated_text']}\n"


@pytest.mark.parametrize("moment", ["import transformers", "import server.engine.engine"])
def test_ctrl_c_ends_a_command_at_once_wherever_it_is(moment: str, folder: Path) -> None:
    """Interrupted during its import, transformers raises an error about a missing module."""
    script = f"""
import builtins, os, signal, sys
real = builtins.__import__

def interrupted(name, *rest, **options):
    if name.startswith({moment.split()[1]!r}):
        os.kill(os.getpid(), signal.SIGINT)
    return real(name, *rest, **options)

builtins.__import__ = interrupted
from server.__main__ import main

sys.exit(main(["generate", "abc", "--model", {str(folder)!r}]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\nbitdial generate: interrupted\n")
