"""SIGTERM and Ctrl-C in every phase of the process's life: the real command, with a slow model."""

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

from server.__main__ import main
from tests import checkpoints
from tests.conftest import wait_until
from tests.http.test_process import ROOT, ask, environment
from tests.service.chat.test_chat_renderer import BOMB, mine

SERVE = """
import sys, time
import loaders
from tests.fakes import fake_load

def load(*arguments):
    {loading}
    model = fake_load(*arguments)
    model.runner.delay = 0.02
    return model

loaders.load = load
from server.__main__ import main

main(["serve", "--model", sys.argv[1], "--port", "0", "--precisions", "fp32"])
"""
TOKENS = 75  # a second and a half


@contextmanager
def serving(
    folder: Path, loading: str = "", grace: str = "30", log: int = subprocess.DEVNULL, **variables: str
) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """Yields the process and its port once it listens; ``log``: its standard error."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE.format(loading=loading), str(folder)],
        cwd=ROOT, env=environment() | {"GRACEFUL_TERMINATION_TIMEOUT": grace} | variables,
        stdout=subprocess.PIPE, stderr=log, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        lines = (re.search(r"listening on http://127\.0\.0\.1:(\d+)", line) for line in process.stdout)
        yield process, int(next(match[1] for match in lines if match))
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoints.save(checkpoints.gpt2(), tmp_path)


def ready(port: int) -> None:
    while ask(port, "GET", "/health")[0] != 200:
        time.sleep(0.05)


def open_stream(port: int) -> http.client.HTTPResponse:
    """A stream after its first token."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps({"inputs": "a", "max_new_tokens": TOKENS})
    connection.request("POST", "/generate_stream", body, {"Content-Type": "application/json"})
    stream = connection.getresponse()
    stream.readline()
    return stream


@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGINT])
def test_the_first_one_drains(folder: Path, signal_: signal.Signals) -> None:
    with serving(folder) as (process, port):
        ready(port)
        stream = open_stream(port)
        process.send_signal(signal_)
        while ask(port, "GET", "/health")[0] == 200:
            time.sleep(0.01)
        for method, path in (("GET", "/health/ready"), ("POST", "/generate"), ("POST", "/v1/completions")):
            assert ask(port, method, path, {"prompt": "x"} if method == "POST" else None)[0] == 503
        assert ask(port, "GET", "/health/live")[0] == 200
        last = [line for line in stream.read().decode().splitlines() if line][-1]
        assert json.loads(last.removeprefix("data: "))["details"]["generated_tokens"] == TOKENS
        assert process.wait(timeout=5) == 0


def test_requests_beyond_the_grace_time_get_an_error(folder: Path) -> None:
    with serving(folder, grace="0.5") as (process, port):
        ready(port)
        stream = open_stream(port)
        process.send_signal(signal.SIGTERM)
        last = [line for line in stream.read().decode().splitlines() if line][-1]
        event = json.loads(last.removeprefix("data: "))
        assert event["error_type"] == "generation"
        assert "shutting down" in event["error"]
        assert process.wait(timeout=5) == 0


def test_the_second_one_ends_at_once(folder: Path) -> None:
    with serving(folder, log=subprocess.PIPE) as (process, port):
        ready(port)
        stream = open_stream(port)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        _, logged = process.communicate(timeout=5)
        assert time.monotonic() - begun < 2
        assert "draining" in logged
        assert "Traceback" not in logged
        stream.close()


def test_a_finished_response_still_reaches_a_slow_reader(folder: Path) -> None:
    with serving(folder) as (process, port), socket.socket() as slow:
        ready(port)
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", port))
        body = json.dumps({"inputs": "a" * 100_000}).encode()
        head = f"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        slow.sendall(head.encode() + body)
        said = http.client.HTTPResponse(slow)
        said.begin()
        process.send_signal(signal.SIGTERM)
        time.sleep(2)
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)  # slow enough by now
        assert len(json.loads(said.read())) == 100_000
        assert process.wait(timeout=5) == 0


def test_a_progress_stream_does_not_delay_the_exit(folder: Path) -> None:
    slowly = "if arguments[0] != 'fp32': time.sleep(60)"
    with serving(folder, loading=slowly) as (process, port):
        ready(port)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/precisions/bf16/load")
        stream = connection.getresponse()
        stream.readline()
        process.send_signal(signal.SIGTERM)
        last = [line for line in stream.read().decode().splitlines() if line][-1]
        event = json.loads(last.removeprefix("data: "))
        assert event["status"] == "failed"
        assert "shutting down" in event["error"]
        assert process.wait(timeout=5) == 0


@pytest.mark.parametrize("error", ["CheckpointError('the weights are cut short')", "MemoryError()"])
def test_a_default_that_cannot_be_loaded_ends_it_with_the_reason(folder: Path, error: str) -> None:
    failing = f"from loaders.errors import CheckpointError; raise {error}"
    done = subprocess.run(
        [sys.executable, "-c", SERVE.format(loading=failing), str(folder)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    reason = "the weights are cut short" if "Checkpoint" in error else "MemoryError"
    assert f"fp32 could not be loaded: {reason}: ending with code 1" in done.stderr


def test_one_while_loading(folder: Path) -> None:
    with serving(folder, loading="time.sleep(60)") as (process, port):
        assert ask(port, "GET", "/health")[0] == 503
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == 0


def test_an_endless_chat_template_does_not_delay_the_exit(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(BOMB)
    with serving(folder, grace="0", CHAT_TEMPLATE=str(file)) as (process, port):
        body = json.dumps({"messages": [{"role": "user", "content": "bomb"}]})
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        wait_until(lambda: mine(process.pid))
        (renders,) = mine(process.pid)
        assert ask(port, "GET", "/health/live")[0] == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == 0
        wait_until(lambda: not renders.is_running())
        connection.close()


@pytest.fixture
def handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("handler")
def test_pid_1_ends_on_sigterm_before_it_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert main(["--version"]) == 0
    assert signal.getsignal(signal.SIGTERM) is before  # other processes keep the system's default

    ended: list[int] = []
    monkeypatch.setattr(os, "getpid", lambda: 1)
    monkeypatch.setattr(os, "_exit", ended.append)
    assert main(["--version"]) == 0
    signal.raise_signal(signal.SIGTERM)
    assert ended == [143]


SLEEPY = """
    from server.service.text.codec import TextCodec
    tokenize = TextCodec.tokenize
    TextCodec.tokenize = lambda codec, text: time.sleep(60) if text == "sleep" else tokenize(codec, text)
"""


def test_slow_readers_and_encoding_end_with_the_grace_time(folder: Path) -> None:
    with serving(folder, SLEEPY, grace="1") as (process, port):
        ready(port)
        readers = [open_tokens(port, text) for text in ("the others, " * 20_000, "sleep")]
        while json.loads(ask(port, "GET", "/stats")[1])["queue"]["in_flight"] < 2:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
        for reader in readers:
            reader.close()


def open_tokens(port: int, text: str) -> socket.socket:
    """A client of ``/tokenize`` that doesn't read the response."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", port))
    body = json.dumps({"inputs": text})
    head = "POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    return connection
