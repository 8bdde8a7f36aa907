"""Ctrl-C in a command: the process ends there and then, with a line that says what became of the work."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130
"""Exit code; what a shell expects of a program that Ctrl-C ended."""
_message = ""


@contextmanager
def end_at_once(message: str) -> Iterator[None]:
    """In it, Ctrl-C prints ``message`` and ends the process.

    A command with something to clean up sets a handler of its own.
    The large libraries, interrupted while they are imported, raise errors of their own; an event loop waits
    for what is being computed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    say_on_interrupt(message)
    before = signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def say_on_interrupt(message: str) -> None:
    """Replaces the line that ``end_at_once`` prints."""
    global _message
    _message = message


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(sys.stderr.fileno(), f"\n{_message}\n".encode())
    os._exit(INTERRUPTED)
