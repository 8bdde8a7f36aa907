"""`bitdial chat` as a person uses it: the real command on a pseudo-terminal, and its own server.

In one test command and server are started as by a person, in the others they are forked.
"""

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests import checkpoints
from tests.conftest import Loads, wait_until
from tests.forked import ROOT, environment
from tests.forked_python import ForkedPython

SECONDS = 120  # a busy host takes this long to import everything twice
INTERRUPT, END = "\x03", "\x04"
_CONTROLS = re.compile(r"\x1b\[[\d;?]*[A-Za-z]")


class Screen:
    """A process on a pseudo-terminal, its input and what it has shown."""

    def __init__(self, process: "subprocess.Popen[bytes]", terminal: int) -> None:
        self.process, self._terminal, self.shown, self.raw = process, terminal, "", ""

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def wait_for(self, pattern: str) -> str:
        """Reads until the pattern is shown after what was waited for before; returns what it matched."""
        end = time.monotonic() + SECONDS
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < end, self.shown
            self._read()
        self.shown = self.shown[found.end() :]
        return found[0]

    def ended(self) -> int:
        """The exit code."""
        end = time.monotonic() + SECONDS
        while self.process.poll() is None:
            assert time.monotonic() < end, self.shown
            self._read()
        return self.process.returncode

    def _read(self) -> None:
        if not select.select([self._terminal], [], [], 0.1)[0]:
            return
        try:
            read = os.read(self._terminal, 4096).decode(errors="replace")
        except OSError:  # the process has ended
            return
        self.raw += read
        self.shown += _CONTROLS.sub("", read)


@contextmanager
def chatting(python: Path | str, state: Path, *arguments: str, **variables: str) -> Iterator[Screen]:
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [python, "-m", "server", "chat", *arguments], cwd=ROOT, start_new_session=True,
        stdin=theirs, stdout=theirs, stderr=theirs,
        env=environment()
        | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "XDG_STATE_HOME": str(state), **variables},
    )  # fmt: skip
    os.close(theirs)
    try:
        yield Screen(process, ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_ctrl_c_stops_the_answer_and_not_the_program(
    serve: Callable[..., str], template: Path, loads: Loads, tmp_path: Path, forked_python: ForkedPython
) -> None:
    url = serve(chat_template=template)
    runner = loads.runners["fp32"]
    runner.delay = 0.05
    with chatting(forked_python.path, tmp_path, "--url", url, "--max-new-tokens", "200") as screen:
        screen.wait_for("fp32>")
        screen.type("hello\r")
        screen.wait_for("hello[^a-z]+[a-z]{4}")
        screen.process.send_signal(signal.SIGINT)
        screen.wait_for(r"\[fp32: .*stopped\]")
        wait_until(lambda: not runner.held)  # cancelled at the server
        runner.delay = 0
        screen.wait_for("fp32>")
        screen.type(INTERRUPT)
        screen.wait_for("Ctrl-D or /bye ends")
        screen.type("hello again\r")
        screen.wait_for(r"\[fp32: \d+ tokens")
        screen.wait_for("fp32>")
        screen.type(END)
        assert screen.ended() == 0


def test_typing_is_completed_and_remembered(
    serve: Callable[..., str], template: Path, tmp_path: Path, forked_python: ForkedPython
) -> None:
    url = serve(chat_template=template)
    with chatting(forked_python.path, tmp_path, "--url", url, "--max-new-tokens", "4") as screen:
        screen.wait_for("fp32>")
        screen.type("/prec\t")
        screen.wait_for("ision")
        screen.type(" bf\t")
        screen.wait_for("bf16")
        screen.type("\r")
        screen.wait_for("from here on in bf16")
        screen.wait_for("bf16>")
        screen.type('"""one\rtwo"""\r')
        screen.wait_for(r"\[bf16: 4 tokens")
        screen.wait_for("bf16>")
        screen.type("/bye\r")
        assert screen.ended() == 0
    kept = tmp_path / "bitdial" / "chat_history"
    assert "+two" in kept.read_text()
    assert kept.stat().st_mode & 0o077 == 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoints.save(checkpoints.gpt2(), tmp_path / "tiny")


def children(pid: int) -> list[psutil.Process]:
    return list(psutil.Process(pid).children(recursive=True))


def test_its_own_server_ends_with_it(folder: Path, tmp_path: Path) -> None:
    proxies = dict.fromkeys(("HTTP_PROXY", "ALL_PROXY"), "http://127.0.0.1:1")  # not for its own server
    options = ("--model", str(folder), "--max-new-tokens", "4", "--no-history")
    with chatting(sys.executable, tmp_path, *options, **proxies) as screen:
        screen.wait_for("no chat template")
        screen.wait_for("fp32>")
        servers = children(screen.process.pid)
        assert servers
        screen.type("abc\r")
        screen.wait_for(r"\[fp32: \d tokens")
        screen.process.kill()
        _, alive = psutil.wait_procs(servers, timeout=SECONDS)
        assert not alive
    assert not (tmp_path / "bitdial").exists()


def test_it_ends_with_its_own_server(folder: Path, tmp_path: Path, forked_python: ForkedPython) -> None:
    options = ("--model", str(folder), "--max-new-tokens", "4", "--no-history")
    with chatting(forked_python.path, tmp_path, *options) as screen:
        screen.wait_for("fp32>")
        for server in children(forked_python.pid(screen.process.pid)):
            server.kill()
        screen.type("abc\r")
        screen.wait_for("its server has ended")
        assert screen.ended() == 128 + signal.SIGKILL


def test_a_dumb_terminal_gets_lines_alone(
    serve: Callable[..., str], template: Path, tmp_path: Path, forked_python: ForkedPython
) -> None:
    url = serve(chat_template=template)
    with chatting(forked_python.path, tmp_path, "--url", url, "--max-new-tokens", "4", TERM="dumb") as screen:
        screen.wait_for("fp32> ")
        screen.type("hello\r")
        screen.wait_for(r"\[fp32: 4 tokens")
        screen.wait_for("fp32> ")
        screen.type(END)
        assert screen.ended() == 0
        assert "\x1b" not in screen.raw
