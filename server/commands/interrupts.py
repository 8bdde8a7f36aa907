"""Ctrl-C in a command: the process exits immediately, with a line about the state of the work."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130
"""Exit code by shell convention for a program ended by Ctrl-C."""
_message = ""


@contextmanager
def end_at_once(message: str) -> Iterator[None]:
    """While entered, Ctrl-C prints ``message`` and exits the process.

    Without it, large libraries interrupted during import raise errors of their own, and an event loop waits
    for the running computation. A command that must clean up installs its own handler.
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


@contextmanager
def clean_up_on_interrupt() -> Iterator[None]:
    """While entered, Ctrl-C and SIGTERM raise ``KeyboardInterrupt``, so that unfinished files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, signal.default_int_handler)
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say_on_interrupt(message: str) -> None:
    """Replaces the line that ``end_at_once`` prints."""
    global _message
    _message = message


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(sys.stderr.fileno(), f"\n{_message}\n".encode())
    os._exit(INTERRUPTED)
