"""Seconds counted on a terminal while nothing comes yet."""

import sys
import threading
import time
from types import TracebackType
from typing import Self, TextIO

from prompt_toolkit.utils import is_dumb_terminal

_SILENT = 1.0  # seconds; shorter waits need no word
_INTERVAL = 0.5


class Waiting:
    """While entered, and until ``stop``, shows how long it has been; nothing if ``out``
    is no terminal that can erase it."""

    def __init__(self, out: TextIO = sys.stderr) -> None:
        self._out = out
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._count, daemon=True)

    def __enter__(self) -> Self:
        if self._out.isatty() and not is_dumb_terminal():
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Removes what was shown."""
        if not self._ended.is_set():
            self._ended.set()
            if self._thread.is_alive():
                self._thread.join()

    def _count(self) -> None:
        begun, drawn = time.monotonic(), False
        self._ended.wait(_SILENT)
        while not self._ended.is_set():
            self._out.write(f"\r… {time.monotonic() - begun:.0f} s")
            self._out.flush()
            drawn = True
            self._ended.wait(_INTERVAL)
        if drawn:
            self._out.write("\r\033[K")
            self._out.flush()
