"""A container's health check against servers that are ready, not ready, and absent."""

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from fastapi import FastAPI

from server.http import health_check
from tests.conftest import serving
from tests.forked import ROOT, environment


def run(**variables: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "server.http.health_check"],
        cwd=ROOT, env=environment() | variables, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def port_of(address: str) -> str:
    return address.rsplit(":", 1)[1]


@pytest.mark.parametrize("host", ["", "0.0.0.0", "127.0.0.1"])
def test_a_ready_server(live: str, host: str) -> None:
    done = run(HOST=host, PORT=port_of(live))
    assert (done.returncode, done.stdout, done.stderr) == (0, "ready\n", "")


def test_proxy_variables_are_ignored(live: str) -> None:
    done = run(
        HOST="0.0.0.0", PORT=port_of(live), http_proxy="http://127.0.0.1:9", HTTP_PROXY="http://127.0.0.1:9"
    )
    assert done.returncode == 0


def test_no_key_is_needed(make_app: Callable[..., FastAPI]) -> None:
    with serving(make_app(api_key="secret")) as address:
        assert run(PORT=port_of(address)).returncode == 0


def test_a_draining_server_is_unhealthy(make_app: Callable[..., FastAPI]) -> None:
    app = make_app()
    with serving(app) as address:
        app.state.lifecycle.drain()
        done = run(PORT=port_of(address))
    assert (done.returncode, done.stdout) == (1, "the server is shutting down\n")


def test_no_server_is_unhealthy() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but not listening
        port = taken.getsockname()[1]
        done = run(PORT=str(port))
    assert done.returncode == 1
    assert done.stdout.startswith(f"no answer on 127.0.0.1, port {port}: ")
    assert done.stderr == ""


class Stranger(BaseHTTPRequestHandler):
    """Another HTTP server on that port."""

    def do_GET(self) -> None:
        self.send_response(500)
        self.end_headers()
        self.wfile.write(b"<html>")

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def stranger() -> Iterator[int]:
    with HTTPServer(("127.0.0.1", 0), Stranger) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_another_server(stranger: int) -> None:
    assert health_check.check("127.0.0.1", stranger) == (False, "not the answer of a bitdial server")


def test_it_imports_nothing_heavy() -> None:
    """It runs every few seconds on the server's host."""
    script = (
        "import sys, server.http.health_check; print({'torch', 'pydantic', 'loaders'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"
