"""A ``python`` that starts at once: an executable whose programs run in processes forked from one that has
imported the libraries (``tests.forked``). For tests of what other processes do, not of how they start.

The executable only passes on what it was given (arguments, environment, standard streams), then signals and
the exit code; the process ends with it. Options other than ``-c`` and ``-m`` it doesn't know.
"""

import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
from contextlib import suppress
from multiprocessing import reduction
from pathlib import Path
from typing import Any, TextIO

from tests.forked import context, start_server

_LAUNCHER = """#!{python} -SE
import json, os, signal, socket, sys
channel = socket.socket(socket.AF_UNIX)
channel.connect({address!r})
leads = os.getsid(0) == os.getpid()
asked = json.dumps([os.getpid(), leads, sys.argv, dict(os.environ), os.getcwd()]).encode()
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, _: channel.send(bytes([number])))
socket.send_fds(channel, [len(asked).to_bytes(4, "big")], [0, 1, 2])
channel.sendall(asked)
code = int(channel.recv(8))
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if code != -signal.SIGKILL else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""


class ForkedPython:
    """The executable, and the processes that stand behind those that were started with it."""

    def __init__(self, folder: Path) -> None:
        address = folder / "socket"
        self.path = folder / "python"
        self.path.write_text(_LAUNCHER.format(python=sys.executable, address=str(address)))
        self.path.chmod(0o755)
        self._pids: dict[int, int] = {}
        self._lock = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(address))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def pid(self, of: int) -> int:
        """Of the process that does what the executable of that pid was asked for."""
        return self._pids[of]

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # close alone leaves a thread in accept
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                channel, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._launch, args=(channel,), daemon=True).start()

    def _launch(self, channel: socket.socket) -> None:
        with channel:
            length, streams, _, _ = socket.recv_fds(channel, 4, 3)
            asked = channel.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL)
            caller, *given = json.loads(asked)
            with self._lock:  # a start also looks after the processes of other threads
                start_server()
                process = context.Process(target=_run, args=(*map(_Stream, streams), *given))
                process.start()
            for stream in streams:
                os.close(stream)
            assert process.pid is not None
            self._pids[caller] = process.pid
            while channel.fileno() in select.select([channel.fileno(), process.sentinel], [], [])[0]:
                told = channel.recv(1)
                os.kill(process.pid, told[0] if told else signal.SIGKILL)
                if not told:  # the executable was killed
                    break
            select.select([process.sentinel], [], [])
            with self._lock:
                process.join()
            with suppress(OSError):
                channel.sendall(str(process.exitcode).encode())


class _Stream:
    """A file descriptor that a process gets when it is started."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (reduction.DupFd(self._number),)


def _received(duplicate: Any) -> int:
    number: int = duplicate.detach()
    return number


def _run(
    reads: int, writes: int, errors: int,
    leads: bool, arguments: list[str], variables: dict[str, str], folder: str,
) -> None:  # fmt: skip
    """As ``python`` with these arguments; ``leads``: a session of its own."""
    if leads:
        os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    for ours, number in ((reads, 0), (writes, 1), (errors, 2)):
        os.dup2(ours, number)
        os.close(ours)
    sys.stdin, sys.stdout, sys.stderr = _standard_streams()
    sys.executable, how, *rest = arguments
    if how == "-m":
        sys.path.insert(0, folder)
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif how == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [how, *rest]
        runpy.run_path(how, run_name="__main__")


def _standard_streams() -> tuple[TextIO, TextIO, TextIO]:
    errors = os.fdopen(2, "w", buffering=1, errors="backslashreplace")
    return os.fdopen(0), os.fdopen(1, "w"), errors
