"""What was measured, kept step by step in the user's cache: an interrupted report goes on where it was."""

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

FORMAT = 2
"""Raised where old figures can't be shown any more."""
NAME = "report.json"
_log = logging.getLogger(__name__)


def folder_of(subject: Subject) -> Path:
    """Where the reports of one subject are kept, a folder for each text."""
    return cache.folder("reports") / subject.key


class Kept:
    """One report, finished or not: ``document`` is all of it.

    Args:
        fresh: begin anew, whatever there is.
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
        self.document["failed"] = {}  # each is tried again

    def get(self, precision: str, step: str) -> Any:
        """The figures of a step; None: not measured yet."""
        return self.document["precisions"].get(precision, {}).get(step)

    def keep(self, precision: str, step: str, figures: Mapping[str, Any]) -> None:
        """What was there already is replaced, and a finished report stays one."""
        steps = self.document["precisions"].setdefault(precision, {})
        whole = self.document["finished"] is not None and step in steps
        steps[step] = dict(figures)
        self.document["finished"] = now() if whole else None
        self.write()

    def fail(self, precision: str, reason: str) -> None:
        """Notes, in this run's document alone, why a precision has no figures."""
        self.document["failed"][precision] = reason

    def finish(self) -> None:
        if self.document["finished"] is None:
            self.document["finished"] = now()
        self.write()

    def write(self) -> None:
        """Whole or not at all, whenever the process ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / f"{NAME}.{os.getpid()}"
        unfinished.write_text(json.dumps(self.document, allow_nan=False), encoding="utf-8")
        unfinished.replace(self.folder / NAME)


def read(folder: Path) -> dict[str, Any] | None:
    """The report kept there; None if there is none that can be read."""
    try:
        document = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        _log.warning("a kept report can't be read (%s) and is ignored", type(error).__name__)
        return None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        return None
    return document


def latest(subject: Subject) -> tuple[dict[str, Any], Path] | None:
    """The subject's report that was finished last, whatever its text, and its folder."""
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
