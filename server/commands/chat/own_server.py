"""The server that ``bitdial chat`` starts for itself: on a free port, for this program alone."""

import os
import re
import secrets
import subprocess
import sys
import threading
from types import TracebackType
from typing import IO, Any, Self

from pydantic import SecretStr

from server.commands.chat.errors import ChatError
from server.commands.command_line import FAILED
from server.host.subprocesses import start_command
from server.settings.server import PrecisionSettings, Settings

_LISTENING = re.compile(r"listening on (http://\S+)")
_TO_END, _ENDING = 5.0, 1.0  # seconds


class OwnServer:
    """``bitdial serve`` in a child process, from its start until the context is left.

    It has a key of its own, which only its environment tells, so that no other user of the host can use it;
    it ends when this process ends, however that comes about. What it has to say of its start (a download's
    progress, an error) goes to this terminal.
    """

    def __init__(self, options: PrecisionSettings) -> None:
        self._options = options
        self.key = secrets.token_urlsafe(32)
        self.url = ""

    def __enter__(self) -> Self:
        """Returns once it listens.

        Raises:
            ChatError: it ended instead; it has told why on standard error.
        """
        self._process: subprocess.Popen[str] = subprocess.Popen(
            start_command("server.commands.chat.own_server", sys.executable),
            env=self._environment(),
            stdin=subprocess.PIPE,  # its end tells the server that this process ended
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for this process
        )
        assert self._process.stdout is not None
        found = next(filter(None, map(_LISTENING.search, self._process.stdout)), None)
        if found is None:
            raise ChatError("its server did not start", exit_code=_exit_code(self._process.wait()))
        self.url = found[1]
        threading.Thread(target=_drain, args=(self._process.stdout,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def ended(self) -> int | None:
        """The exit code of a server that has ended, or ends now; None if it goes on."""
        try:
            return _exit_code(self._process.wait(_ENDING))
        except subprocess.TimeoutExpired:
            return None

    def _environment(self) -> dict[str, str]:
        """This process's, with the options in place of any setting of a server."""
        kept = {
            name: value for name, value in os.environ.items() if name.lower() not in Settings.model_fields
        }
        chosen = {name: getattr(self._options, name, None) for name in Settings.model_fields}
        own = {
            "host": "127.0.0.1",
            "port": 0,
            "api_key": self.key,
            "admin_api_key": self.key,
            "precisions": self._options.precision,
            "log_level": "error",
        }
        settings = {**{k: v for k, v in chosen.items() if v is not None}, **own}
        return kept | {name.upper(): _as_variable(value) for name, value in settings.items()}


def main() -> None:
    """Serves until standard input ends."""
    from server.commands import serve

    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.exit(serve.main([], command="chat"))


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):  # sys.stdin's lock would abort the interpreter's own end
        pass
    os._exit(0)


def _drain(stream: IO[str]) -> None:
    for _ in stream:
        pass


def _exit_code(found: int) -> int:
    """As a shell has it: 128 and the signal's number for a process that was killed; never 0."""
    return 128 - found if found < 0 else found or FAILED


def _as_variable(value: Any) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return str(value).lower() if isinstance(value, bool) else str(value)
