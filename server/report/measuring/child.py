"""The subprocess in which a server measures a report: reads one job, writes events, as lines of JSON.

It runs at the lowest priority and loads models of its own, so that the server's engines are not used. The
server suspends it while requests run.
"""

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from io import BytesIO
from typing import Any

from loaders.errors import LoaderError
from loaders.texts import Text, TextError
from server.bench.errors import BenchError
from server.errors import ServiceError
from server.report.measuring.job import ReportOptions, make
from server.report.measuring.measure import StepProgress
from server.report.measuring.speed import Pauses
from server.report.plots import PlotsUnavailable
from server.settings.server import ModelSettings

_INTERVAL = 0.1  # seconds between events of one stage
_DIE_WITH_PARENT = 1  # prctl(2), PR_SET_PDEATHSIG


def main() -> None:
    """Reads ``{"settings", "options", "text"}``; the last line written is ``{"kept"}`` or ``{"error"}``."""
    _yield_to_others()
    pauses = Pauses().watch()
    job = json.loads(sys.stdin.readline())
    try:
        _write({"kept": _make(job, pauses)})
    except (PlotsUnavailable, LoaderError, ServiceError, TextError, BenchError) as error:
        _write({"error": str(error)})
    except OSError as error:
        _write({"error": f"the report can't be kept: {error.strerror}"})


def _make(job: Mapping[str, Any], pauses: Pauses) -> str:
    from loaders.checkpoint import open_checkpoint

    settings = ModelSettings(**job["settings"])
    checkpoint = open_checkpoint(settings.model_id, settings.revision)
    precisions = tuple(job["options"]["precisions"])
    options = ReportOptions(**{**job["options"], "precisions": precisions}, text=_text(job))
    return str(make(settings, checkpoint, options, _ProgressEvents(), pauses).folder)


def _text(job: Mapping[str, Any]) -> Text | None:
    if job["text"] is None:
        return None
    data = job["text"].encode()
    return Text("the text of the request", len(data), lambda: BytesIO(data))


class _ProgressEvents:
    """Writes progress events, within a stage at most one every ``_INTERVAL``."""

    def __init__(self) -> None:
        self._stage, self._next = "", 0.0

    def __call__(self, at: StepProgress) -> None:
        stage, now = f"{at.step} {at.stage}", time.monotonic()
        if stage == self._stage and now < self._next and at.current < at.total:
            return
        self._stage, self._next = stage, now + _INTERVAL
        progress = {"current": at.current, "total": at.total}
        step = {"step": at.step, "steps": at.steps, "precision": at.precision, "stage": at.stage}
        _write({"status": "measuring", **step, "progress": progress})


def _write(event: Mapping[str, Any]) -> None:
    print(json.dumps(event), flush=True)


def _yield_to_others() -> None:
    """Lowers the CPU priority as far as the system allows, and has the kernel kill it with its parent."""
    with suppress(OSError, AttributeError):
        os.nice(19)
    with suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
