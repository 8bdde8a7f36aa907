"""The process as a supervisor and a person meet it: real subprocesses of the `bitdial` command."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import checkpoints

ROOT = Path(__file__).resolve().parent.parent


def environment() -> dict[str, str]:
    keep = {
        name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "PYTHONPATH")
    }
    return {**keep, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def bitdial(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "server", *arguments],
        cwd=ROOT, env=environment() | variables, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save(checkpoints.gpt2(), tmp_path_factory.mktemp("models") / "tiny")


@contextmanager
def serving(folder: Path) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "server", "serve", "--model", str(folder), "--port", "0", "--precisions=fp32"],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if match := re.search(r"listening on http://127\.0\.0\.1:(\d+)", line):
                break
        else:
            raise AssertionError("it ended without listening")
        port = int(match[1])
        while ask(port, "GET", "/health")[0] != 200:
            time.sleep(0.05)
        yield process, port
    finally:
        process.kill()
        process.wait()


def ask(port: int, method: str, path: str, body: object = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, answer.read()


def open_stream(port: int, tokens: int) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    parameters = {"max_new_tokens": tokens, "ignore_eos": True}
    body = json.dumps({"inputs": "a", "parameters": parameters})
    connection.request("POST", "/generate_stream", body, {"Content-Type": "application/json"})
    stream = connection.getresponse()
    stream.readline()
    return stream


def test_sigterm_lets_a_stream_finish_and_exits_0(folder: Path) -> None:
    with serving(folder) as (process, port):
        stream = open_stream(port, 200)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
        last = [line for line in stream.read().decode().splitlines() if line][-1]
        assert '"generated_tokens": 200' in last
        assert process.wait(timeout=20) == 0


def test_a_second_sigterm_ends_at_once(folder: Path) -> None:
    with serving(folder) as (process, port):
        streams = [open_stream(port, 250) for _ in range(12)]
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=10)
        del streams


def test_a_port_in_use_is_one_clear_failure(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = bitdial("serve", "--model", str(folder), "--port", str(taken.getsockname()[1]))
    assert done.returncode == 1
    assert "address already in use" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_that_cannot_be_had_is_one_line(tmp_path: Path) -> None:
    done = bitdial("serve", MODEL_ID=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"bitdial serve: {tmp_path.name} has no config.json: it is not a transformers checkpoint"
    ]


def test_wrong_usage_is_one_line_and_code_2() -> None:
    done = bitdial("serve", "--port", "abc")
    assert done.returncode == 2
    assert re.fullmatch(r"bitdial serve: --port \(or PORT\): .*\n", done.stderr)


def test_generate_in_the_terminal(folder: Path) -> None:
    done = bitdial("generate", "abc", "--model", str(folder), "--max-new-tokens", "5", "--precision", "4bit")
    assert done.returncode == 0
    assert done.stdout.startswith("abc")
    assert re.search(r"\[nf4: \d tokens, first after", done.stderr)


def test_precisions_lists_the_registry(folder: Path) -> None:
    done = bitdial("precisions", "--model", str(folder))
    assert done.returncode == 0
    for name in ("fp32", "int8", "nf4", "dynamic-int8"):
        assert re.search(rf"^{name} .*(yes|no: )", done.stdout, re.M)
