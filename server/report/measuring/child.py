"""The process in which a server has its report made: an order in, events out, a line each.

It has the lowest priority, and the models a second time, so that no engine of the server's is touched. The
server stops it while requests run, and lets it go on when none does.
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
from loaders.quality import QualityError, Text
from server.bench.errors import BenchError
from server.errors import ServiceError
from server.report.measuring.job import Wishes, make
from server.report.measuring.measure import Place
from server.report.measuring.speed import Pauses
from server.report.plots import PlotsUnavailable
from server.settings.server import ModelSettings

_INTERVAL = 0.1  # seconds between events of one stage
_DIE_WITH_PARENT = 1  # prctl(2), PR_SET_PDEATHSIG


def main() -> None:
    """Reads ``{"settings", "wishes", "text"}``; the last line is ``{"kept"}`` or ``{"error"}``."""
    _yield_to_others()
    pauses = Pauses().watch()
    order = json.loads(sys.stdin.readline())
    try:
        _say({"kept": _make(order, pauses)})
    except (PlotsUnavailable, LoaderError, ServiceError, QualityError, BenchError) as error:
        _say({"error": str(error)})
    except OSError as error:
        _say({"error": f"the report can't be kept: {error.strerror}"})


def _make(order: Mapping[str, Any], pauses: Pauses) -> str:
    from loaders.checkpoint import open_checkpoint

    settings = ModelSettings(**order["settings"])
    checkpoint = open_checkpoint(settings.model_id, settings.revision)
    wishes = Wishes(
        **{**order["wishes"], "precisions": tuple(order["wishes"]["precisions"])}, text=_text(order)
    )
    return str(make(settings, checkpoint, wishes, _Teller(), pauses).folder)


def _text(order: Mapping[str, Any]) -> Text | None:
    if order["text"] is None:
        return None
    data = order["text"].encode()
    return Text("the text of the request", len(data), lambda: BytesIO(data))


class _Teller:
    """Says where the measurement is, a stage's progress not too often."""

    def __init__(self) -> None:
        self._stage, self._next = "", 0.0

    def __call__(self, place: Place) -> None:
        stage, now = f"{place.step} {place.stage}", time.monotonic()
        if stage == self._stage and now < self._next and place.current < place.total:
            return
        self._stage, self._next = stage, now + _INTERVAL
        progress = {"current": place.current, "total": place.total}
        at = {"step": place.step, "steps": place.steps, "precision": place.precision, "stage": place.stage}
        _say({"status": "measuring", **at, "progress": progress})


def _say(event: Mapping[str, Any]) -> None:
    print(json.dumps(event), flush=True)


def _yield_to_others() -> None:
    """Computes only where nobody else wants to, as far as the system offers that; ends with its parent."""
    with suppress(OSError, AttributeError):
        os.nice(19)
    with suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
