"""``bitdial bench`` from its options to its last line."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import loaders
from loaders.base import Checkpoint, LoadedModel, ModelSpec
from server.bench import report as reports
from server.bench import table
from server.bench.contenders import Contender
from server.bench.errors import BenchError
from server.bench.host import MemorySpeed, pin
from server.bench.options import Options
from server.bench.peers import environment
from server.bench.peers.export import export
from server.bench.peers.process import PeersProcess
from server.bench.reference import GenerateContender
from server.bench.session import MakeContender, Plan, Progress, Row, Session

ProgressOf = Callable[[str], Progress]
"""What is told of a precision's loading and measuring, by its name."""


def bench(options: Options, checkpoint: Checkpoint, progress_of: ProgressOf) -> None:
    """Measures and prints; the JSON line comes last.

    Raises:
        BenchError, LoaderError
    """
    cpus = pin(options.threads)
    spec = options.spec(checkpoint, slots=max(options.batch_sizes))
    if options.prompt + options.tokens > spec.max_tokens:
        raise BenchError(
            f"--prompt {options.prompt} and --tokens {options.tokens} exceed the context of {spec.max_tokens}"
        )
    speed = MemorySpeed(spec.device)
    report = reports.Report(
        host=reports.host_facts(cpus, speed.measure(), speed.buffer_bytes),
        model=reports.model_facts(checkpoint),
        settings=options.model_dump(mode="json", exclude={"model_id", "json_file"}),
    )
    print(reports.introduction(report), flush=True)
    with _peers(options, checkpoint, report) as peers:
        _Bench(options, spec, speed, report, progress_of, peers).rows()
    print(report.write(options.json_file))


class _Bench:
    """What the parts of one measurement share."""

    def __init__(
        self,
        options: Options,
        spec: ModelSpec,
        speed: MemorySpeed,
        report: reports.Report,
        progress_of: ProgressOf,
        peers: PeersProcess | None,
    ) -> None:
        self._peers = peers
        self._options, self._spec, self._speed = options, spec, speed
        self._report, self._progress_of = report, progress_of
        self._plan = Plan(
            batches=options.batch_sizes,
            prompt=options.prompt,
            tokens=options.tokens,
            repeat=options.repeat,
            vocabulary=spec.checkpoint.vocabulary,
            threads=report.host["threads"],
        )

    def rows(self) -> None:
        """Every precision at every batch size, beside what it is compared with."""
        print(table.heading(), flush=True)
        for name in self._options.names():
            progress = self._progress_of(name)
            session = Session(
                plan=self._plan,
                load=partial(self._load, name, progress),
                others=self._others(name),
                speed=self._speed,
                progress=progress,
                show=self._show,
            )
            asyncio.run(session.measure())
        print(f"\n{table.LEGEND}\n", flush=True)

    def _load(self, name: str, progress: Progress) -> LoadedModel:
        return loaders.load(name, self._spec, progress)

    def _others(self, precision: str) -> list[MakeContender]:
        others: list[MakeContender] = []
        if self._options.generate:
            others.append(partial(_reference, precision, self._spec))
        if self._peers is not None:
            others += self._peers.contenders(precision)
        return others

    def _show(self, row: Row) -> None:
        self._report.add(row)
        print(table.line(row), flush=True)


@contextmanager
def _peers(options: Options, checkpoint: Checkpoint, report: reports.Report) -> Iterator[PeersProcess | None]:
    """The process of the other engines, if they are to be measured; the files made for it go afterwards."""
    if not options.peers:
        yield None
        return
    python = environment.ensure(options.peers_venv)
    with TemporaryDirectory(prefix="bitdial-peers-") as folder:
        process = PeersProcess(python, export(checkpoint, Path(folder)), report.host["threads"])
        report.host["peers"] = process.versions
        try:
            yield process
        finally:
            process.close()


async def _reference(precision: str, spec: ModelSpec) -> Contender:
    return GenerateContender(precision, spec)
