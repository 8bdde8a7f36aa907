"""SIGTERM and Ctrl-C in every phase of the process's life: the real command, with a slow model."""

import http.client
import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from server.__main__ import main
from tests import checkpoints
from tests.conftest import wait_until
from tests.forked import Script, ask, completed, running
from tests.service.chat.test_chat_renderer import BOMB, mine

SERVE = """
import pathlib, sys, time
import loaders
from tests.fakes import fake_load

go_on = pathlib.Path(sys.argv[1], "go-on")

def load(*arguments):
    {loading}
    model = fake_load(*arguments)

    model.runner.on_decode = lambda slots: None if go_on.exists() else time.sleep(0.05)
    return model

loaders.load = load
from server.__main__ import main

main(["serve", "--model", sys.argv[1], "--port", "0", "--precisions", "fp32"])
"""
TOKENS = 100  # five seconds, unless they go on at once


@contextmanager
def serving(
    folder: Path, loading: str = "", grace: str = "600", **variables: str
) -> Iterator[tuple[Script, int]]:
    """Yields the process and its port once it listens.

    Tokens are slow until there is a file ``go-on`` in the folder.
    """
    script = SERVE.format(loading=loading)
    with running(script, str(folder), GRACEFUL_TERMINATION_TIMEOUT=grace, **variables) as process:
        lines = (re.search(r"listening on http://127\.0\.0\.1:(\d+)", line) for line in process.stdout)
        yield process, int(next(match[1] for match in lines if match))


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
        (folder / "go-on").touch()
        last = [line for line in stream.read().decode().splitlines() if line][-1]
        assert json.loads(last.removeprefix("data: "))["details"]["generated_tokens"] == TOKENS
        assert process.wait() == 0


def test_requests_beyond_the_grace_time_get_an_error(folder: Path) -> None:
    with serving(folder, grace="0.5") as (process, port):
        ready(port)
        stream = open_stream(port)
        process.send_signal(signal.SIGTERM)
        last = [line for line in stream.read().decode().splitlines() if line][-1]
        event = json.loads(last.removeprefix("data: "))
        assert event["error_type"] == "generation"
        assert "shutting down" in event["error"]
        assert process.wait() == 0


def test_the_second_one_ends_at_once(folder: Path) -> None:
    with serving(folder) as (process, port):
        ready(port)
        stream = open_stream(port)
        process.send_signal(signal.SIGTERM)
        while ask(port, "GET", "/health")[0] == 200:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        process.wait()
        try:
            rest = stream.read()
        except (http.client.IncompleteRead, ConnectionResetError):
            rest = b""
        assert b"details" not in rest  # of its last event: neither its end nor the grace time was waited for
        assert "draining" in process.stderr()
        assert "Traceback" not in process.stderr()


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
        while ask(port, "GET", "/health")[0] == 200:
            time.sleep(0.01)
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)  # slow enough by now
        assert len(json.loads(said.read())) == 100_000
        assert process.wait() == 0


def test_a_progress_stream_does_not_delay_the_exit(folder: Path) -> None:
    slowly = "if arguments[0] != 'fp32': time.sleep(600)"
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
        assert process.wait() == 0


@pytest.mark.parametrize("error", ["CheckpointError('the weights are cut short')", "MemoryError()"])
def test_a_default_that_cannot_be_loaded_ends_it_with_the_reason(folder: Path, error: str) -> None:
    failing = f"from loaders.errors import CheckpointError; raise {error}"
    done = completed(SERVE.format(loading=failing), str(folder))
    assert done.returncode == 1
    reason = "the weights are cut short" if "Checkpoint" in error else "MemoryError"
    assert f"fp32 could not be loaded: {reason}: ending with code 1" in done.stderr


def test_one_while_loading(folder: Path) -> None:
    with serving(folder, loading="time.sleep(600)") as (process, port):
        assert ask(port, "GET", "/health")[0] == 503
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0


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
        assert process.wait() == 0
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
    TextCodec.tokenize = lambda codec, text: time.sleep(600) if text == "sleep" else tokenize(codec, text)
"""


def test_slow_readers_and_encoding_end_with_the_grace_time(folder: Path) -> None:
    with serving(folder, SLEEPY, grace="1") as (process, port):
        ready(port)
        readers = [open_tokens(port, text) for text in ("the others, " * 20_000, "sleep")]
        while json.loads(ask(port, "GET", "/stats")[1])["queue"]["in_flight"] < 2:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
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
