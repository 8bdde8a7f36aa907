"""Calibrations in the user's cache, one file per precision, under the key of the report's subject."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from loaders.locking import locked
from server.host import cache
from server.planning.calibration import Calibration, Progress
from server.planning.workload import Frontend, Replica
from server.report.store import now
from server.report.subject import Subject, digest_of

FORMAT = 2
_FRONTEND = "frontend"
_log = logging.getLogger(__name__)
_Figures = TypeVar("_Figures", Calibration, Frontend)


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
        return self._read(precision, _calibration)

    def frontend(self) -> Frontend | None:
        return self._read(_FRONTEND, lambda figures: Frontend(**figures))

    def keep(self, calibration: Calibration) -> None:
        """Raises: OSError."""
        self._write(calibration.precision, calibration.as_dict())

    def keep_frontend(self, frontend: Frontend) -> None:
        """Raises: OSError."""
        self._write(_FRONTEND, vars(frontend))

    def _read(self, name: str, read: Callable[[dict[str, Any]], _Figures]) -> _Figures | None:
        """The saved figures; None if there are none, or they can't be used."""
        if self._fresh:
            return None
        try:
            document = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
            return read(document["figures"]) if document["format"] == FORMAT else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, LookupError) as error:
            _log.warning("saved step times can't be read (%s) and are ignored", type(error).__name__)
            return None

    def _write(self, name: str, figures: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / f"{name}.json.{os.getpid()}"
        document = {"format": FORMAT, "measured": now(), "figures": figures}
        unfinished.write_text(json.dumps(document, allow_nan=False), encoding="utf-8")
        unfinished.replace(self.folder / f"{name}.json")


def _calibration(figures: dict[str, Any]) -> Calibration:
    found = Calibration.read(figures)
    found.step_times()  # what it raises is raised here
    return found


@contextmanager
def alone(progress: Progress) -> Iterator[None]:
    """While entered, no other ``bitdial plan`` of this user measures: each would halve the other's speed.

    Raises:
        OSError: nothing can be written there.
    """
    with locked(cache.folder("plans") / "measuring", progress):
        yield
