"""Two texts in two columns on a terminal, with a mark where they diverge."""

import unicodedata
from collections.abc import Iterator
from itertools import zip_longest

from server.evaluation.comparison import first_divergence

MARK = "▶"
_BETWEEN = " │ "
_NARROWEST = 16
_JOINERS = "\u200c\u200d"  # of Persian and Indic letters, and of emoji
_KEPT = "\n" + _JOINERS


def side_by_side(titles: tuple[str, str], texts: tuple[str, str], width: int) -> list[str]:
    """Both texts as lines, each wrapped to half of ``width``."""
    column = max(_NARROWEST, (width - len(_BETWEEN)) // 2)
    diverges = first_divergence(*texts)
    same = len(texts[0]) if diverges is None else diverges
    left, right = (list(wrapped(shown(text[:same]) + MARK + shown(text[same:]), column)) for text in texts)
    head = [titles, ("─" * column, "─" * column)]
    rows = [*head, *zip_longest(left, right, fillvalue="")]
    return [f"{_padded(one, column)}{_BETWEEN}{other}".rstrip() for one, other in rows]


def shown(text: str) -> str:
    """``text`` without control characters, which could move the cursor; those that join letters stay."""
    text = text.expandtabs(4)
    return "".join(c if c in _KEPT or c.isprintable() else "�" for c in text)


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
    """Width of the text on a terminal, in columns."""
    return sum(map(_columns_of, text))


def _columns_of(character: str) -> int:
    if character in _JOINERS or unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _fitting(line: str, width: int) -> int:
    """How many of the line's first characters fit."""
    taken = 0
    for index, character in enumerate(line):
        taken += _columns_of(character)
        if taken > width:
            return index
    return len(line)


def _padded(text: str, width: int) -> str:
    return text + " " * (width - columns(text))
