"""Calibrations in the user's cache, one file per precision, under the key of the report's subject."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from server.host import cache
from server.planning.calibration import Calibration
from server.planning.workload import Frontend, Replica
from server.report.store import now
from server.report.subject import Subject, digest_of

FORMAT = 1
_FRONTEND = "frontend"
_log = logging.getLogger(__name__)


class Store:
    """What was measured of one subject, with chunks of these sizes, on these CPUs.

    Args:
        fresh: nothing that was saved before is read.
    """

    def __init__(self, subject: Subject, replica: Replica, fresh: bool = False) -> None:
        cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        measured = digest_of([replica.chunk, replica.busy_chunk, cpus])
        self.folder: Path = cache.folder("plans") / subject.key / measured
        self._fresh = fresh

    def calibration(self, precision: str) -> Calibration | None:
        found = self._read(precision)
        return None if found is None else Calibration.read(found)

    def frontend(self) -> Frontend | None:
        found = self._read(_FRONTEND)
        return None if found is None else Frontend(**found)

    def keep(self, calibration: Calibration) -> None:
        """Raises: OSError."""
        self._write(calibration.precision, calibration.as_dict())

    def keep_frontend(self, frontend: Frontend) -> None:
        """Raises: OSError."""
        self._write(_FRONTEND, vars(frontend))

    def _read(self, name: str) -> dict[str, Any] | None:
        if self._fresh:
            return None
        try:
            document = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            _log.warning("saved step times can't be read (%s) and are ignored", type(error).__name__)
            return None
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            return None
        figures: dict[str, Any] = document["figures"]
        return figures

    def _write(self, name: str, figures: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / f"{name}.json.{os.getpid()}"
        document = {"format": FORMAT, "measured": now(), "figures": figures}
        unfinished.write_text(json.dumps(document, allow_nan=False), encoding="utf-8")
        unfinished.replace(self.folder / f"{name}.json")
