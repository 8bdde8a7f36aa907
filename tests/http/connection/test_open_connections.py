"""More connections than allowed: idle ones are closed, new ones served or refused, the log stays short."""

import contextlib
import json
import os
import re
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fastapi import FastAPI

from server.__main__ import main
from server.http.connection.open_connections import OpenConnections, RateLimited, Stage
from server.http.connection.open_files import most_connections
from server.settings.server import Settings
from tests import checkpoints
from tests.commands.test_signals import SERVE
from tests.conftest import PATIENCE, Loads, serving, wait_until
from tests.forked import ROOT, ask, environment
from tests.http.connection.test_slow_clients import connected, received, request_for, status_of, still_serves

MakeApp = Callable[..., FastAPI]
LIVE = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"


class Remembered:
    """Replaces a connection."""

    def __init__(self) -> None:
        self.ended: str | None = None

    def evict(self) -> None:
        self.ended = "evicted"

    def abort(self) -> None:
        self.ended = "aborted"


def admitted(table: OpenConnections, *stages: Stage) -> list[Remembered]:
    found = [Remembered() for _ in stages]
    for connection, stage in zip(found, stages, strict=True):
        assert table.admit(connection)
        table.set_stage(connection, stage)
    return found


def test_which_connection_makes_room() -> None:
    """Idle ones first, then those whose request is arriving; the longest wait first; no active one."""
    table = OpenConnections(5)
    busy, receiving, idle, again, other = admitted(
        table, Stage.BUSY, Stage.RECEIVING, Stage.IDLE, Stage.IDLE, Stage.RECEIVING
    )
    table.set_stage(receiving, Stage.RECEIVING)  # another byte of the same request
    for stage in (Stage.RECEIVING, Stage.BUSY, Stage.IDLE):  # a whole request later
        table.set_stage(again, stage)
    order = []
    for _ in range(4):
        assert admitted(table, Stage.BUSY)
        order.append(next(one for one in (idle, again, receiving, other) if one.ended and one not in order))
    assert order == [idle, again, receiving, other]
    assert not table.admit(Remembered())
    assert busy.ended is None
    table.remove(busy)
    assert table.admit(Remembered())


def test_the_number_of_lingering_connections_is_bounded() -> None:
    table = OpenConnections(4)
    connections = [Remembered() for _ in range(6)]
    for connection in connections:
        assert table.admit(connection)
        table.linger(connection)
    assert [one.ended for one in connections] == ["aborted"] * 2 + [None] * 4
    assert table.free_a_file()
    assert connections[2].ended == "aborted"
    table.abort_lingering()
    assert all(one.ended for one in connections)
    assert not table.free_a_file()


def test_a_repeated_warning_is_one_line_a_second(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    said = RateLimited()
    for _ in range(1000):
        said.warning("full")
    now += 1.5
    said.warning("full")
    assert caplog.messages == ["full", "full (999 more since the last such line)"]


class Observed(OpenConnections):
    stages: ClassVar[dict[object, Stage]] = {}

    def set_stage(self, connection: Any, stage: Stage) -> None:
        self.stages[connection] = stage
        super().set_stage(connection, stage)


def answer_on(connection: socket.socket) -> int:
    """The status of a JSON response that is read to its end; the connection stays open."""
    said = b""
    while not said.endswith(b"}"):
        part = connection.recv(65536)
        assert part, said
        said += part
    return status_of(said)


def wait_for_stages(*stages: Stage) -> None:
    """Every connection of the server, in order of arrival."""
    wait_until(lambda: list(Observed.stages.values()) == list(stages))


@pytest.fixture
def three(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, FastAPI]]:
    """A server for three connections, with small socket buffers."""
    monkeypatch.setattr("server.http.server_config.OpenConnections", Observed)
    Observed.stages.clear()
    app = make_app(max_connections=3, receive_timeout=20)
    with serving(app, send_buffer=4096) as address:
        yield address, app


def test_idle_connections_make_room(three: tuple[str, FastAPI]) -> None:
    address, app = three
    with contextlib.ExitStack() as stack:
        silent, kept, other = (stack.enter_context(connected(address)) for _ in range(3))
        for connection in (kept, other):
            connection.sendall(LIVE)
            assert answer_on(connection) == 200
        wait_for_stages(*[Stage.IDLE] * 3)
        newcomer = stack.enter_context(connected(address))
        newcomer.sendall(LIVE)
        assert answer_on(newcomer) == 200
        assert received(silent) == b""
        for connection in (kept, other):
            connection.sendall(LIVE)
            assert answer_on(connection) == 200
    still_serves(address, app)


BODY = b'{"inputs": "abc", "max_new_tokens": 3}'
POST = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


@pytest.mark.parametrize(
    ("begun", "rest"),
    [(b"GET /health HTTP/1.1\r\n", b"Host: x\r\n\r\n"), (POST % len(BODY) + BODY[:5], BODY[5:])],
)
def test_incomplete_requests_make_room(three: tuple[str, FastAPI], begun: bytes, rest: bytes) -> None:
    address, app = three
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connected(address)) for _ in range(3)]
        for connection in slow:
            connection.sendall(begun)
        wait_for_stages(*[Stage.RECEIVING] * 3)
        newcomer = stack.enter_context(connected(address))
        newcomer.sendall(LIVE)
        assert answer_on(newcomer) == 200
        head, _, body = received(slow[0]).partition(b"\r\n\r\n")
        assert status_of(head) == 503
        assert json.loads(body)["error_type"] == "unavailable"
        slow[2].sendall(rest)
        assert answer_on(slow[2]) == 200
    still_serves(address, app)


def test_a_slow_reader_of_its_last_answer_makes_room(three: tuple[str, FastAPI]) -> None:
    address, app = three
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connected(address, 4096)) for _ in range(3)]
        for number, connection in enumerate(slow):
            closing = "Connection: close" if number else "X-Nothing: 1"
            connection.sendall(request_for("/openapi.json", None, closing))
            connection.recv(1, socket.MSG_PEEK)
        wait_for_stages(*[Stage.IDLE] * 3)
        newcomers = [stack.enter_context(connected(address)) for _ in range(3)]
        for newcomer in newcomers:
            newcomer.sendall(LIVE)
            assert answer_on(newcomer) == 200
        assert all(len(received(connection)) < 80_000 for connection in slow)
    still_serves(address, app)


def test_a_new_connection_is_refused_if_all_are_active(three: tuple[str, FastAPI], loads: Loads) -> None:
    address, app = three
    loads.runners["fp32"].delay = 0.02
    body = {"inputs": "abc", "max_new_tokens": 50, "ignore_eos": True}
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(connected(address)) for _ in range(3)]
        for stream in streams:
            stream.sendall(request_for("/generate_stream", body, "Connection: close"))
        wait_until(lambda: app.state.service.places.in_flight == 3)
        newcomer = stack.enter_context(connected(address))
        newcomer.sendall(request_for("/generate", body))  # which stays unread
        head, _, said = received(newcomer).partition(b"\r\n\r\n")
        assert status_of(head) == 503
        assert b"retry-after: " in head.lower()
        assert json.loads(said)["error_type"] == "unavailable"
        assert all(b'"generated_text":"' in received(stream) for stream in streams)
    loads.runners["fp32"].delay = 0
    still_serves(address, app)


def test_room_by_the_limit_of_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, most in ((40, 20), (256, 160), (1024, 928), (65_536, 4096), (resource.RLIM_INFINITY, 4096)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, resource.RLIM_INFINITY))
        assert most_connections() == most
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 256))
    assert most_connections(160) == 160
    with pytest.raises(ValueError, match=r"161 connections need 257 open files; the limit is 256"):
        most_connections(161)
    assert Settings().max_connections is None


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.fixture
def confined(tmp_path: Path) -> Iterator[tuple["subprocess.Popen[str]", int, Path]]:
    """A server process with a soft limit of 80 open files and a hard one of 120; its port and log."""
    checkpoints.save(checkpoints.gpt2(), tmp_path)
    log = tmp_path / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE.format(loading=""), str(tmp_path)],
            cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=stderr, text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (80, 120)),
        )  # fmt: skip
        try:
            assert process.stdout is not None
            lines = (re.search(r"listening on http://127\.0\.0\.1:(\d+)", line) for line in process.stdout)
            yield process, int(next(match[1] for match in lines if match)), log
        finally:
            process.kill()
            process.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="it changes another process's limits")
def test_a_process_survives_running_out_of_files(
    confined: tuple["subprocess.Popen[str]", int, Path],
) -> None:
    process, port, log = confined
    wait_until(lambda: ask(port, "GET", "/health")[0] == 200)
    assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE) == (120, 120)
    before = open_files(process.pid)

    def flooded_with_idle_connections() -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(150):
                one = stack.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE))
                with contextlib.suppress(OSError):  # closed to make room
                    one.sendall(b"G")  # silent ones stay in the accept queue for a while
            assert ask(port, "GET", "/health/live")[0] == 200
            assert ask(port, "POST", "/generate", {"inputs": "a", "max_new_tokens": 2})[0] == 200
            assert ask(port, "GET", "/docs/static/swagger-ui.css")[0] == 200

    flooded_with_idle_connections()
    assert "no connection can be accepted" not in log.read_text()
    wait_until(lambda: open_files(process.pid) <= before)
    # a limit below the server's estimate
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (before + 10, before + 10))
    flooded_with_idle_connections()
    warnings = [line for line in log.read_text().splitlines() if "no connection can be accepted" in line]
    assert 1 <= len(warnings) <= 10
    assert "Traceback" not in log.read_text()


def test_more_connections_than_files_are_refused_at_the_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--max-connections", "1000000"]) == 2
    expected = r"bitdial serve: --max-connections \(or MAX_CONNECTIONS\): 1000000 connections need .*\n"
    assert re.fullmatch(expected, capsys.readouterr().err)
