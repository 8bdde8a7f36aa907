"""Programs of the converter's environment: their output as it is written, and the reason if they fail."""

import os
import re
import select
import subprocess
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from loaders.errors import LoaderError, without_paths

_TICK = 1000  # milliseconds without output, after which the caller hears that the program still runs
_TAIL = 12  # lines of a failed program's output that are searched for the reason
_ERROR = re.compile("error|no module named|apt install", re.IGNORECASE)
_FULL = "No space left on device"


class ConverterUnavailable(LoaderError):
    """The converter can't be installed or run."""


def output_lines(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """The lines that a program writes, and an empty one for every second in which it writes none.

    The program is killed if the iterator is closed before its end.

    Raises:
        ConverterUnavailable: it can't be started, or it failed.
    """
    last: deque[str] = deque(maxlen=_TAIL)
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    except OSError as error:
        raise ConverterUnavailable(_message([f"{error.strerror or type(error).__name__}"])) from error
    with process:
        try:
            assert process.stdout is not None
            for line in _lines(process.stdout.fileno()):
                if line := line.strip():
                    last.append(line)
                yield line
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise ConverterUnavailable(_message(list(last), process.returncode))


def _lines(descriptor: int) -> Iterator[str]:
    poll, rest = select.poll(), b""
    poll.register(descriptor, select.POLLIN | select.POLLHUP)
    while True:
        if not poll.poll(_TICK):
            yield ""
            continue
        if not (data := os.read(descriptor, 1 << 16)):
            break
        *whole, rest = (rest + data).split(b"\n")
        yield from (line.decode(errors="replace") for line in whole)
    yield rest.decode(errors="replace")


def _message(last: Sequence[str], code: int = 1) -> str:
    """Of a program that failed: its last error, and what may help."""
    errors = [line for line in last if _ERROR.search(line)] or list(last)
    why = f"exit code {code}" if code < 0 or not errors else without_paths(errors[-1])
    text = "\n".join(last)
    network = any(word in text.lower() for word in ("connection", "resolve", "timed out", "no matching"))
    hint = ""
    if _FULL in text:
        why = "the disk is full"
    elif network and code > 0:
        hint = "; it is installed once, which needs a network"
    return f"LiteRT's converter can't be used ({why}){hint}"
