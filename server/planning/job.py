"""From the settings to measured step times: loads each precision that has none, and measures it."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import loaders
from loaders.base import Checkpoint, LoadedModel, ModelSpec
from loaders.errors import LoaderError
from server.bench.errors import BenchError
from server.bench.http.own_server import own_server
from server.errors import ServiceError
from server.host import cache
from server.host.memory import free_bytes
from server.host.threads import run_in_own_thread
from server.planning.calibration import SLOTS, Calibration, Calibrator, Progress
from server.planning.frontend import STREAMS, FrontendRounds, measure_frontend
from server.planning.store import Store, alone
from server.planning.workload import Frontend, Replica
from server.report.rows import rows_of
from server.report.store import latest
from server.report.subject import Subject, subject_of
from server.settings.model import ModelSettings

_SERVER_BYTES = 2**30  # of a process beside its weights: libraries, keys and values


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
    job = _Job(settings, spec, replica, store, bars)
    measured, failed = list[Calibration](), dict[str, str]()
    for name in precisions:
        try:
            measured.append(job.calibration(name, with_http=http and not measured))
        except (LoaderError, ServiceError) as error:
            if len(precisions) == 1:
                raise
            failed[name] = str(error)
    if not measured:
        raise BenchError(f"no precision could be measured: {next(iter(failed.values()))}")
    frontend = job.frontend(measured[0]) if http else Frontend()
    return Measured(subject, measured, failed, frontend)


@dataclass
class _Job:
    """What was measured before, or is measured now; alone on this host, as far as plans go."""

    settings: ModelSettings
    spec: ModelSpec
    replica: Replica
    store: Store
    bars: Callable[[str], Progress]
    measured_frontend: Frontend | None = None

    def calibration(self, precision: str, with_http: bool) -> Calibration:
        """Args: with_http: what HTTP adds is measured in the same minutes, unless it is known."""
        if (found := self.store.calibration(precision)) is not None:
            return found
        progress = self.bars(precision)
        with alone(progress):
            # another command may have measured it meanwhile
            if (found := self.store.calibration(precision)) is not None:
                return found
            return self._calibrate(precision, with_http and self.store.frontend() is None, progress)

    def _calibrate(self, precision: str, with_http: bool, progress: Progress) -> Calibration:
        threads = self.settings.resolved_threads()
        model = run_in_own_thread(lambda: loaders.load(precision, self.spec, progress), threads)

        async def run() -> Calibration:  # its engine is of the event loop that creates it
            calibrator = Calibrator(model, threads, self.replica.chunk, self.replica.busy_chunk)
            if not with_http or not _has_room_for_another(model, self.spec):
                return await calibrator.measure(progress)
            async with own_server(self.settings, precision, STREAMS, threads) as client:
                rounds = FrontendRounds(client, precision)
                await rounds.prepare()
                found = await calibrator.measure(progress, rounds.round)
            self.measured_frontend = rounds.frontend(found.step_times())
            self.store.keep_frontend(self.measured_frontend)
            return found

        found = asyncio.run(run())
        self.store.keep(found)
        return found

    def frontend(self, first: Calibration) -> Frontend:
        """Args: first: the precision that the measured server runs."""
        found = self.measured_frontend or self.store.frontend()
        if found is None:
            progress = self.bars("HTTP")
            with alone(progress):
                progress("measuring requests", 0, 0)
                found = asyncio.run(measure_frontend(self.settings, first.precision, first.step_times()))
            self.store.keep_frontend(found)
        return found


def _has_room_for_another(model: LoadedModel, spec: ModelSpec) -> bool:
    """Whether a server may load the same model beside this one; it may read it in full precision first."""
    needed = max(4 * model.footprint.parameters, model.footprint.weights_bytes) + _SERVER_BYTES
    return free_bytes(spec.device) > needed
