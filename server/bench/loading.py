"""Memory while a precision is loaded, each in a new process, so that one load doesn't hide the next."""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

from server.bench.errors import BenchError
from server.bench.peak_memory import reset_peak, status_bytes, trim
from server.host.subprocesses import start_command
from server.host.threads import compute_with
from server.settings.server import ModelSettings
from server.tables import Column

_MEGA = 1e6
LEGEND = """\
peak         largest resident set while loading (VmHWM) − the one before, in a process that has loaded the
             bundled model in this precision already, so that the libraries' own memory is not counted
ratio        peak ÷ (checkpoint + weights): files on disk and live tensors of the loaded precision
after        resident set after loading − the one before"""


@dataclass(frozen=True)
class Loading:
    """Memory and time of loading one precision. Bytes; None if the system doesn't report them."""

    precision: str
    checkpoint_bytes: int
    weights_bytes: int
    peak_growth_bytes: int | None
    resident_growth_bytes: int | None
    seconds: float

    @property
    def ratio(self) -> float | None:
        if self.peak_growth_bytes is None:
            return None
        return self.peak_growth_bytes / (self.checkpoint_bytes + self.weights_bytes)

    def figures(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}


COLUMNS: list[Column[Loading]] = [
    Column("precision", "", 13, lambda row: row.precision, left=True),
    Column("checkpoint", "MB", 10, lambda row: _mega(row.checkpoint_bytes)),
    Column("weights", "MB", 8, lambda row: _mega(row.weights_bytes)),
    Column("peak", "+MB", 8, lambda row: _mega(row.peak_growth_bytes)),
    Column("ratio", "", 6, lambda row: None if row.ratio is None else f"{row.ratio:.2f}"),
    Column("after", "+MB", 8, lambda row: _mega(row.resident_growth_bytes)),
    Column("seconds", "", 8, lambda row: f"{row.seconds:.2f}"),
]


def measure_loading(precision: str, settings: dict[str, Any], threads: int) -> Loading:
    """Measures in a new process on the same CPUs.

    Args:
        settings: values of ``ModelSettings``.

    Raises:
        BenchError: the process failed; the message has its last line.
    """
    order = json.dumps({"precision": precision, "settings": settings, "threads": threads})
    done = subprocess.run(
        start_command("server.bench.loading", sys.executable), input=order, capture_output=True, text=True
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no output"]
        raise BenchError(f"loading {precision} in a process of its own failed: {last[0]}")
    return Loading(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Entry point of the process: reads an order from stdin, prints the figures to stdout."""
    order = json.loads(sys.stdin.read())
    print(json.dumps(asdict(_measure(**order))))


def _measure(precision: str, settings: dict[str, Any], threads: int) -> Loading:
    import loaders
    from loaders.base import ModelSpec
    from loaders.checkpoint import open_checkpoint
    from loaders.model_id import BUNDLED

    compute_with(threads)
    chosen = ModelSettings(**settings)
    loaders.load(precision, ModelSpec(open_checkpoint(BUNDLED), chosen.resolved_device())).close()
    checkpoint = open_checkpoint(chosen.model_id, chosen.revision)
    trim()
    reset_peak()
    resident = status_bytes("VmRSS")
    model = loaders.load(precision, chosen.spec(checkpoint, slots=1))
    resident_growth = _growth("VmRSS", resident)  # first: reading the status allocates too
    return Loading(
        precision=precision,
        checkpoint_bytes=checkpoint.file_bytes,
        weights_bytes=model.footprint.weights_bytes,
        peak_growth_bytes=_growth("VmHWM", resident),
        resident_growth_bytes=resident_growth,
        seconds=model.load_seconds,
    )


def _growth(field: str, before: int | None) -> int | None:
    now = status_bytes(field)
    return None if now is None or before is None else now - before


def _mega(size: int | None) -> str | None:
    return None if size is None else f"{size / _MEGA:.1f}"
