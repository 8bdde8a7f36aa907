"""From the settings to measured step times: loads each precision that has none, and measures it."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import loaders
from loaders.base import Checkpoint
from loaders.errors import LoaderError
from server.bench.errors import BenchError
from server.errors import ServiceError
from server.host import cache
from server.host.threads import run_in_own_thread
from server.planning.calibration import SLOTS, Calibration, Calibrator, Progress
from server.planning.frontend import measure_frontend
from server.planning.store import Store, alone
from server.planning.workload import Frontend, Replica
from server.report.rows import rows_of
from server.report.store import latest
from server.report.subject import Subject, subject_of
from server.settings.model import ModelSettings


@dataclass
class Measured:
    """What plans are made from."""

    subject: Subject
    calibrations: list[Calibration]
    failed: dict[str, str]
    """Why precisions have no figures."""
    frontend: Frontend

    def perplexity_ratios(self) -> dict[str, float]:
        """By precision, from the stored report: perplexity ÷ fp32's; empty without a report."""
        if (found := latest(self.subject)) is None:
            return {}
        rows = rows_of(found[0])
        return {row.precision: row.perplexity_ratio for row in rows if row.perplexity_ratio is not None}


def measure(
    settings: ModelSettings,
    checkpoint: Checkpoint,
    precisions: Sequence[str],
    replica: Replica,
    http: bool,
    fresh: bool,
    bars: Callable[[str], Progress],
) -> Measured:
    """Reads what was measured before, and measures the rest.

    Args:
        http: measures what HTTP adds; without, it is 0.

    Raises:
        LoaderError, ServiceError, BenchError: no precision could be measured, or no server started.
        OSError: the figures can't be saved.
    """
    spec = settings.spec(checkpoint, slots=SLOTS)
    subject = subject_of(spec)
    store = Store(subject, replica, fresh)
    cache.check_room(store.folder)
    failed: dict[str, str] = {}

    def calibrations() -> Iterator[Calibration]:
        for name in precisions:
            found = store.calibration(name)
            try:
                yield found or calibrate_alone(name)
            except (LoaderError, ServiceError) as error:
                if len(precisions) == 1:
                    raise
                failed[name] = str(error)

    def calibrate_alone(name: str) -> Calibration:
        progress = bars(name)
        with alone(progress):
            # another command may have measured it meanwhile
            return store.calibration(name) or calibrate(name, progress)

    def calibrate(name: str, progress: Progress) -> Calibration:
        threads = settings.resolved_threads()
        model = run_in_own_thread(lambda: loaders.load(name, spec, progress), threads)

        async def run() -> Calibration:
            calibrator = Calibrator(model, threads, replica.chunk, replica.busy_chunk)
            return await calibrator.measure(progress)

        found = asyncio.run(run())
        store.keep(found)
        return found

    def measure_http(first: Calibration) -> Frontend:
        progress = bars("HTTP")
        with alone(progress):
            progress("measuring requests", 0, 0)
            coroutine = measure_frontend(settings, first.precision, first.step_times(), replica)
            found = asyncio.run(coroutine)
        store.keep_frontend(found)
        return found

    measured = list(calibrations())
    if not measured:
        raise BenchError(f"no precision could be measured: {next(iter(failed.values()))}")
    frontend = Frontend()
    if http:
        frontend = store.frontend() or measure_http(measured[0])
    return Measured(subject, measured, failed, frontend)
