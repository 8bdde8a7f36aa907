"""Output on a terminal: above progress bars, wrapped to its width, without machine-readable JSON."""

import re
import shutil
import sys
import textwrap

from tqdm import tqdm

_TERM = re.compile(r"\S.*?\s{2,}")


def terminal_width() -> int | None:
    """Columns of the terminal that is standard output; None for a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def say(text: str = "") -> None:
    """Prints ``text`` above any progress bars."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def folded(text: str) -> str:
    """``text`` with each line wrapped to the terminal; a legend's line continues under its explanation."""
    width = terminal_width()
    if width is None:
        return text
    return "\n".join(_folded(line, width) for line in text.split("\n"))


def _folded(line: str, width: int) -> str:
    term = _TERM.match(line)
    indent = " " * term.end() if term and term.end() < width // 2 else "  "
    # textwrap collapses the gap after the term only where it breaks a line
    return textwrap.fill(line, width, subsequent_indent=indent, break_on_hyphens=False) or line


def say_json(line: str, option: str = "--json FILE") -> None:
    """Prints a line of JSON to a file or a pipe; on a terminal prints the option that writes it instead."""
    say(f"All figures as JSON: {option}, or pipe the output." if sys.stdout.isatty() else line)
