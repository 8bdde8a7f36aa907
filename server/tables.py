"""Tables: aligned text within a terminal's width, and Markdown."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Generic, TypeVar

NONE = "–"
_R = TypeVar("_R")


@dataclass(frozen=True)
class Column(Generic[_R]):
    """A heading, its unit on the line below, and a row's text (None: the value is unknown)."""

    name: str
    unit: str
    width: int
    value: Callable[[_R], str | None]
    left: bool = False

    def place(self, text: str | None) -> str:
        shown = NONE if text is None else text
        return shown.ljust(self.width) if self.left else shown.rjust(self.width)


class Table(Generic[_R]):
    """A table printed row by row as the rows are measured.

    On a terminal that is too narrow, ``heading`` and ``line`` show the columns that fit; ``rest`` shows the
    others once all rows are known.

    Args:
        keys: the first so many columns name the row and are repeated in every part.
        width: columns of the terminal; None: no limit.
    """

    def __init__(self, columns: Sequence[Column[_R]], keys: int, width: int | None) -> None:
        self._parts = list(_parts(columns, keys, width))

    def heading(self) -> str:
        """The lines above the rows."""
        return _heading(self._parts[0])

    def line(self, row: _R) -> str:
        return _line(self._parts[0], row)

    def rest(self, rows: Sequence[_R]) -> str:
        """The columns that did not fit, as tables below each other; empty where all did."""
        tables = (
            "\n".join([_heading(part), *(_line(part, row) for row in rows)]) for part in self._parts[1:]
        )
        return "\n\n".join(tables)


def cells(columns: Sequence[tuple[str, Callable[[_R], str]]], rows: Iterable[_R]) -> list[list[str]]:
    """The headings, then each row's texts.

    Args:
        columns: heading, and a row's text.
    """
    return [[heading for heading, _ in columns], *([show(row) for _, show in columns] for row in rows)]


def aligned(
    cells: Sequence[Sequence[str]], width: int | None = None, left: Collection[int] = (0,)
) -> list[str]:
    """The lines of a table, each column as wide as its longest cell.

    Args:
        cells: rows, the headings first.
        width: what exceeds it goes below, after the first column again; None: no limit.
        left: indices of the columns aligned to the left; the others are aligned to the right.
    """
    columns: list[Column[Sequence[str]]] = [
        Column(name, "", max(len(row[at]) for row in cells), itemgetter(at), at in left)
        for at, name in enumerate(cells[0])
    ]
    lines: list[str] = []
    for part in _parts(columns, 1, width):
        lines += ["", *(_line(part, row) for row in cells)]
    return lines[1:]


def markdown_table(cells: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, the headings first; all columns but the first are aligned to the right."""
    head, *rows = (f"| {' | '.join(row)} |" for row in cells)
    return "\n".join([head, f"|---|{'---:|' * (len(cells[0]) - 1)}", *rows])


def _heading(columns: Sequence[Column[_R]]) -> str:
    names = "  ".join(column.place(column.name) for column in columns).rstrip()
    units = "  ".join(column.place(column.unit) for column in columns).rstrip()
    rule = "─" * max(len(names), len(units))
    return "\n".join(filter(None, (names, units, rule)))


def _line(columns: Sequence[Column[_R]], row: _R) -> str:
    return "  ".join(column.place(column.value(row)) for column in columns).rstrip()


def _parts(columns: Sequence[Column[_R]], keys: int, width: int | None) -> Iterator[list[Column[_R]]]:
    """As many columns beside each other as fit, after the keys; at least one."""
    part = list(columns[:keys])
    for column in columns[keys:]:
        used = sum(one.width + 2 for one in part)
        if width is not None and used + column.width > width and len(part) > keys:
            yield part
            part = list(columns[:keys])
        part.append(column)
    yield part
