"""Text that comes in pieces, on a terminal broken between words."""

import re
import shutil
from typing import TextIO

from server.commands.side_by_side import columns, shown

_PARTS = re.compile(r"\n|[^\S\n]+|\S+")


class Flow:
    """Writes text as it comes; without a terminal as it is, but for control characters.

    A word is written when what follows it has come, since only then it is known to fit into its line.
    """

    def __init__(self, out: TextIO) -> None:
        self._out, self._wraps = out, out.isatty()
        self._column = 0
        self._space = self._word = ""
        self._empty = True

    def write(self, text: str) -> None:
        self._empty = self._empty and not text
        if self._wraps:
            for part in _PARTS.findall(shown(text)):
                self._take(part)
        else:
            self._out.write(shown(text))
        self._out.flush()

    def end(self) -> None:
        """Writes what is held back, and ends the line if there was any text."""
        self._put()
        if not self._empty:
            self._out.write("\n")
        self._out.flush()

    def _take(self, part: str) -> None:
        if part.isspace():
            self._put()
            if part == "\n":
                self._out.write("\n")
                self._column, part = 0, ""
            self._space += part
            return
        self._word += part
        wide = columns(self._word) != len(self._word)  # such scripts have no blanks between words
        if wide or len(self._word) >= self._width():
            self._put()

    def _put(self) -> None:
        if not self._word:
            self._space = "" if self._column else self._space
            return
        needed = columns(self._space + self._word)
        if self._column and self._column + needed > self._width():
            self._out.write(f"\n{self._word}")
            self._column = columns(self._word)
        else:
            self._out.write(self._space + self._word)
            self._column += needed
        self._space = self._word = ""

    def _width(self) -> int:
        return shutil.get_terminal_size().columns
