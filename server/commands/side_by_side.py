"""Two texts in two columns on a terminal, with a mark where they part."""

import unicodedata
from collections.abc import Iterator
from itertools import zip_longest

from server.evaluation.comparison import first_divergence

MARK = "▶"
_BETWEEN = " │ "
_NARROWEST = 16


def side_by_side(titles: tuple[str, str], texts: tuple[str, str], width: int) -> list[str]:
    """Both texts from their beginning, each wrapped to half of ``width``."""
    column = max(_NARROWEST, (width - len(_BETWEEN)) // 2)
    apart = first_divergence(*texts)
    same = len(texts[0]) if apart is None else apart
    left, right = (list(wrapped(shown(text[:same]) + MARK + shown(text[same:]), column)) for text in texts)
    head = [titles, ("─" * column, "─" * column)]
    rows = [*head, *zip_longest(left, right, fillvalue="")]
    return [f"{_padded(one, column)}{_BETWEEN}{other}".rstrip() for one, other in rows]


def shown(text: str) -> str:
    """What a terminal can show: control characters could move its cursor."""
    text = text.expandtabs(4)
    return "".join(c if c == "\n" or c.isprintable() else "�" for c in text)


def wrapped(text: str, width: int) -> Iterator[str]:
    """Lines of at most ``width`` columns, broken after a space where there is one."""
    for line in text.split("\n"):
        while columns(line) > width:
            cut = _fitting(line, width)
            space = line.rfind(" ", 0, cut)
            cut = space + 1 if space > 0 and line[:space].strip() else cut
            yield line[:cut].rstrip()
            line = line[cut:]
        yield line


def columns(text: str) -> int:
    """Columns that a terminal gives to it."""
    return sum(map(_columns_of, text))


def _columns_of(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _fitting(line: str, width: int) -> int:
    """How many of the line's characters fit."""
    taken = 0
    for index, character in enumerate(line):
        taken += _columns_of(character)
        if taken > width:
            return index
    return len(line)


def _padded(text: str, width: int) -> str:
    return text + " " * (width - columns(text))
