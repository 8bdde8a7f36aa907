"""Findings of a check: printed as they come, and in one JSON file that is always complete."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from server.bench import table
from server.bench.document import Report
from server.bench.session import Row


class Result:
    """Rewrites its file after every finding, so that an interrupted check keeps its figures.

    Args:
        report: the host, the model and the settings; receives the rows.
        file: path of the JSON.
    """

    def __init__(self, report: Report, file: Path) -> None:
        self._report, self._file = report, file
        self.sections: dict[str, Any] = report.sections
        self.sections |= {"complete": False, "failures": [], "skipped": []}
        self.rows: list[tuple[str, Row]] = []
        """Model name and row."""

    def note(self, section: str, found: Any) -> None:
        """Adds a finding to a section."""
        self.sections.setdefault(section, []).append(found)
        self.save()

    def add(self, model: str, row: Row) -> None:
        """Adds and prints a measured row."""
        self.rows.append((model, row))
        self._report.add(row)
        self._report.rows[-1]["model"] = model
        print(table.WHOLE.line(row), flush=True)
        self.save()

    def compare(self, model: str, row: Row) -> Row:
        """The row with bitdial's ratio at the same size, if that was measured."""
        ours = self.ours(model, row.precision, row.batch)
        if ours is None:
            return row
        rate = ours.figures.decode_tokens_per_second
        return replace(row, ratio=rate / row.figures.decode_tokens_per_second)

    def ours(self, model: str, precision: str, batch: int, engine: str = "bitdial") -> Row | None:
        wanted = (model, precision, batch, engine)
        return next((r for m, r in self.rows if (m, r.precision, r.batch, r.engine) == wanted), None)

    def failed(self, what: str) -> None:
        """Records a failure: the whole check fails."""
        print(f"FAILED  {what}", flush=True)
        self.sections["failures"].append(what)
        self.save()

    def skipped(self, what: str, why: str) -> None:
        print(f"left out  {what}: {why}", flush=True)
        self.sections["skipped"].append({"what": what, "why": why})
        self.save()

    def finish(self) -> None:
        self.sections["complete"] = True
        self.save()

    def save(self) -> str:
        """Writes the file atomically; returns the JSON line."""
        beside = self._file.with_suffix(".part")
        beside.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(self._report.text() + "\n")
        beside.replace(self._file)
        return self._report.line()

    @property
    def sound(self) -> bool:
        return not self.sections["failures"]


def default_file(card: str) -> Path:
    """docs/results/gpu-<card>-<date>.json"""
    name = "-".join(card.lower().replace("/", " ").split())
    return Path("docs", "results", f"gpu-{name}-{time.strftime('%Y-%m-%d', time.gmtime())}.json")
