"""Reports in the user's cache, saved after every step: an interrupted report continues where it stopped."""

import json
import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from server.host import cache
from server.report.subject import Reading, Subject

FORMAT = 3
"""Incremented when documents of older versions can't be rendered any more, or have figures that are wrong."""
NAME = "report.json"
_log = logging.getLogger(__name__)


def folder_of(subject: Subject) -> Path:
    """The folder of a subject's reports, with a subfolder for each text."""
    return cache.folder("reports") / subject.key


class SavedReport:
    """One saved report, finished or not; ``document`` is its content.

    Args:
        fresh: starts with an empty document instead of the saved one.
    """

    def __init__(self, subject: Subject, reading: Reading, fresh: bool = False) -> None:
        self.folder = folder_of(subject) / reading.key
        found = None if fresh else read(self.folder)
        self.document: dict[str, Any] = found or {
            "format": FORMAT,
            "started": now(),
            "finished": None,
            **asdict(subject),
            "text": asdict(reading),
            "precisions": {},
            "failed": {},
        }
        self.document["failed"] = {}  # failed precisions are tried again

    def get(self, precision: str, step: str) -> Any:
        """The figures of a step; None if it was not measured yet."""
        return self.document["precisions"].get(precision, {}).get(step)

    def keep(self, precision: str, step: str, figures: Mapping[str, Any]) -> None:
        """Saves a step. A finished report stays finished if the step replaces an earlier one."""
        steps = self.document["precisions"].setdefault(precision, {})
        whole = self.document["finished"] is not None and step in steps
        steps[step] = dict(figures)
        self.document["finished"] = now() if whole else None
        self.write()

    def fail(self, precision: str, reason: str) -> None:
        """Records why a precision has no figures; the next run drops the record."""
        self.document["failed"][precision] = reason

    def finish(self) -> None:
        if self.document["finished"] is None:
            self.document["finished"] = now()
        self.write()

    def write(self) -> None:
        """Replaces the file atomically."""
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / f"{NAME}.{os.getpid()}"
        unfinished.write_text(json.dumps(self.document, allow_nan=False), encoding="utf-8")
        unfinished.replace(self.folder / NAME)


def read(folder: Path) -> dict[str, Any] | None:
    """The report in the folder; None if there is none, or it can't be read."""
    try:
        document = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        _log.warning("a saved report can't be read (%s) and is ignored", type(error).__name__)
        return None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        return None
    return document


def latest(subject: Subject) -> tuple[dict[str, Any], Path] | None:
    """The subject's report finished last, of any text, and its folder."""
    found: list[tuple[str, Path, dict[str, Any]]] = []
    with suppress(OSError):
        for folder in folder_of(subject).iterdir():
            document = read(folder)
            if document is not None and document["finished"]:
                found.append((document["finished"], folder, document))
    if not found:
        return None
    _, folder, document = max(found, key=lambda one: (one[0], one[1].name))
    return document, folder


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
