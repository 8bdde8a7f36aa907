"""Scripts in processes of their own, forked from one that has imported the libraries that a server needs.

Signals, exit codes and output need a process; most of its start is the import of torch and transformers, and
that happens once here for all tests of a worker. Tests of the start itself use ``subprocess``.
"""

import http.client
import json
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tests.conftest import PATIENCE

ROOT = Path(__file__).resolve().parents[1]
_IMPORTED = [__name__, "tests.fakes", "transformers.models.gpt2.modeling_gpt2", "fastapi_offline"]
"""Without the server: a script may change what it imports."""
_BITDIAL = "import sys; from server.__main__ import main; sys.exit(main())"
context = multiprocessing.get_context("forkserver")


def environment() -> dict[str, str]:
    """The variables of processes that tests start."""
    keep = {
        name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "PYTHONPATH")
    }
    return {**keep, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


class Script:
    """A running script; ``stdout`` is for the test to read, standard error is read as it comes."""

    def __init__(self, source: str, *arguments: str, **variables: str) -> None:
        start_server()
        (out, their_out), (err, their_err) = context.Pipe(duplex=False), context.Pipe(duplex=False)
        given = (source, arguments, environment() | variables, their_out, their_err)
        self._process = context.Process(target=_run, args=given)
        self._process.start()
        for theirs in (their_out, their_err):
            theirs.close()
        self.stdout, self._stderr = (os.fdopen(os.dup(ours.fileno())) for ours in (out, err))
        self._said: list[str] = []
        self._reader = threading.Thread(target=lambda: self._said.extend(self._stderr), daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int | None:
        """The exit code; None if it still runs after a long time."""
        self._process.join(PATIENCE)
        return self._process.exitcode

    def stderr(self) -> str:
        """All of its standard error, once it has ended."""
        self._reader.join(PATIENCE)
        return "".join(self._said)

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._reader.join()
        self.stdout.close()
        self._stderr.close()


@contextmanager
def running(source: str, *arguments: str, **variables: str) -> Iterator[Script]:
    """Runs a Python script like ``python -c``, and kills it if it is still running on leaving."""
    script = Script(source, *arguments, **variables)
    try:
        yield script
    finally:
        script.close()


def completed(source: str, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Runs a Python script to its end."""
    with running(source, *arguments, **variables) as script:
        out = script.stdout.read()
        code = script.wait()
        assert code is not None
        return subprocess.CompletedProcess(["python", "-c", source, *arguments], code, out, script.stderr())


def bitdial(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Runs the command."""
    return completed(_BITDIAL, *arguments, **variables)


def ask(port: int, method: str, path: str, body: object = None) -> tuple[int, bytes]:
    """A request to a server on this host."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, answer.read()


def start_server() -> None:
    """Starts the process that forks, unless it runs; libraries read some variables as they are imported."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        context.set_forkserver_preload(_IMPORTED)
        forkserver.ensure_running()


def _run(
    source: str, arguments: tuple[str, ...], variables: dict[str, str], out: Connection, err: Connection
) -> None:
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(variables)
    for connection, number in ((out, 1), (err, 2)):
        os.dup2(connection.fileno(), number)
        connection.close()
    sys.argv = ["-c", *arguments]
    exec(compile(source, "<script>", "exec"), {"__name__": "__main__"})
