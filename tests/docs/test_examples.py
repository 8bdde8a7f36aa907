"""What the documents show is run: Python, commands, requests, a new precision, the notebook."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import nbformat
import pytest
from nbclient import NotebookClient

import loaders
from server.__main__ import main
from tests.conftest import wait_until
from tests.docs.blocks import DOCS, Block, blocks
from tests.forked_python import ForkedPython

ROOT = DOCS.parent
CONSOLE = [block for block in blocks("tutorial.md", "run") if block.language == "console"]


@pytest.fixture
def environment(tmp_path: Path, cache: Path) -> Mapping[str, str]:
    """That of a user: ``bitdial`` on the PATH, no model named (the bundled one), an empty cache."""
    command = tmp_path / "bin" / "bitdial"
    command.parent.mkdir()
    put(command, sys.executable)
    path = f"{command.parent}:{os.environ['PATH']}"
    own = {"PATH": path, "PYTHONPATH": str(ROOT), "THREADS": "1", "DEVICE": "cpu"}
    return {**os.environ, **own, "XDG_CACHE_HOME": str(cache)}


def put(command: Path, python: Path | str) -> None:
    """Makes the command a script for that Python."""
    command.write_text(f'#!/bin/sh\nexec {python} -m server "$@"\n')
    command.chmod(0o755)


def run(script: str, environment: Mapping[str, str], folder: Path) -> str:
    done = subprocess.run(
        ["bash", "-c", script], env=environment, cwd=folder, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_python_page_runs_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    shown = blocks("python.md", "run")
    assert len(shown) >= 4
    for block in shown:
        exec(compile(block.text, "docs/python.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.startswith("<LoadedModel nf4 of bundled: ")


@pytest.mark.parametrize("block", CONSOLE, ids=lambda block: block.commands[0].split()[1])
def test_the_tutorials_commands_run(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, which has imported the libraries already."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("THREADS", "1")
    for line in block.commands:
        program, *arguments = shlex.split(line)
        assert program == "bitdial"
        assert main(arguments) == 0, line
        assert capsys.readouterr().out, line


def test_the_terminals_commands_run(
    environment: Mapping[str, str], tmp_path: Path, forked_python: ForkedPython
) -> None:
    put(tmp_path / "bin" / "bitdial", forked_python.path)
    piped, continued = blocks("terminal.md", "run")
    answers = run("\n".join(["set -euo pipefail", *piped.commands]), environment, tmp_path)
    assert answers.startswith("s, the following code:")
    lines = run("\n".join(["set -euo pipefail", *continued.commands]), environment, tmp_path).splitlines()
    assert lines[0].startswith("Return a list of")
    assert json.loads(lines[-1])["generated_tokens"] == 3


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_tutorials_requests_are_answered(environment: Mapping[str, str], tmp_path: Path) -> None:
    (block,) = blocks("tutorial.md", "serve")
    with serving(block.argument, environment) as port:
        script = "\n".join(["set -euo pipefail", *block.commands]).replace(
            "127.0.0.1:8080", f"127.0.0.1:{port}"
        )
        answers = [
            json.loads(line)
            for line in run(script.replace("curl ", "curl -w '\\n' "), environment, tmp_path).splitlines()
        ]
    generated, stats = answers
    assert generated["precision"] == "nf4"
    assert generated["usage"]["generated_tokens"] == 8
    assert stats["precisions"]["dynamic-int8"]["state"] == "loaded"


@contextmanager
def serving(options: str, environment: Mapping[str, str]) -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    command = ["bitdial", "serve", "--port", str(port), *options.split()]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as server:
        try:
            wait_until(lambda: is_ready(port), seconds=60)
            yield port
        finally:
            server.terminate()


def is_ready(port: int) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def test_the_documented_precision_loads_and_continues_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = blocks("adding-a-precision.md", "file")
    assert block.argument == "loaders/precisions/rounded.py"
    (tmp_path / "rounded.py").write_text(block.text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(loaders.PRECISIONS, "rounded-int8", "rounded")
    full, model = (loaders.load(name, "bundled") for name in ("fp32", "rounded-int8"))
    assert model.footprint.weights_bytes < 0.6 * full.footprint.weights_bytes
    assert model.footprint.quantized
    assert "rounded-int8" in model._repr_html_()
    ids = model.tokenizer("Return the")["input_ids"]
    expected, found = full.runner.score(ids), model.runner.score(ids)
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.05
    assert model.generate("Return the", max_new_tokens=8)


def test_the_notebook_runs_and_is_committed_without_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked_python: ForkedPython
) -> None:
    notebook = nbformat.reads((DOCS / "quantization.ipynb").read_text(), as_version=4)  # type: ignore[no-untyped-call]
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    kernel = tmp_path / "kernels" / "python3"  # this interpreter's, whatever kernels a user has installed
    kernel.mkdir(parents=True)
    arguments = [str(forked_python.path), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(
        json.dumps({"argv": arguments, "display_name": "test", "language": "python"})
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    tables = [output.data["text/html"] for output in shown if output.output_type == "execute_result"]
    assert [precision in table for precision, table in zip(("nf4", "dynamic-int8"), tables, strict=True)] == [
        True,
        True,
    ]
    assert "4-bit" in tables[0]
    printed = "".join(output.text for output in shown if output.output_type == "stream")
    assert "fp32          float32    0.00%  exact" in printed
