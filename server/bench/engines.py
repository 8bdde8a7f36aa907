"""Every precision's engine and those it is compared with: the main table."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, AsyncExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import loaders
from loaders.base import LoadedModel, ModelSpec
from server.bench import table
from server.bench.bandwidth import MemorySpeed
from server.bench.contenders import Contender
from server.bench.document import Report
from server.bench.http.contender import HttpContender
from server.bench.http.own_server import own_server
from server.bench.options import Options
from server.bench.peers import environment
from server.bench.peers.export import export
from server.bench.peers.worker import PAIRS
from server.bench.processes import WorkerProcess
from server.bench.session import MakeContender, Plan, Progress, Row, Session
from server.bench.table import PrintedTable
from server.host.threads import run_in_own_thread
from server.terminal import folded, say

ProgressOf = Callable[[str], AbstractContextManager[Progress]]
"""Returns a progress callback for loading and measuring a precision."""
MakersOf = Callable[[str], list[MakeContender]]
"""Returns the factories of a precision's contenders."""


class Engines:
    """Measures one precision after the other and prints each row as it is measured.

    Args:
        speed: measures the device's memory bandwidth, for the floor.
        report: receives the rows.
    """

    def __init__(
        self, options: Options, spec: ModelSpec, speed: MemorySpeed, report: Report, progress_of: ProgressOf
    ) -> None:
        self._options, self._spec, self._speed = options, spec, speed
        self._report, self._progress_of = report, progress_of
        self._threads: int = report.host["threads"]
        self._plan = Plan(
            batches=options.batch_sizes,
            prompt=options.prompt,
            tokens=options.tokens,
            repeat=options.repeat,
            vocabulary=spec.checkpoint.vocabulary,
            threads=self._threads,
        )

    def measure(self) -> None:
        """Raises: BenchError, LoaderError."""
        with self._reference() as reference, self._peers() as peers:
            self._table = PrintedTable(table.COLUMNS, 3, table.LEGEND)
            for name in self._options.names():
                with self._progress_of(name) as progress:
                    session = Session(
                        plan=self._plan,
                        load=partial(self._load, name, progress),
                        others=[*self._http(name), *reference(name), *peers(name)],
                        speed=self._speed,
                        progress=progress,
                        show=self._show,
                        device=self._spec.device,
                    )
                    asyncio.run(session.measure())
        self._table.end()
        if (warning := table.warning(self._table.rows)) is not None:
            say(f"{folded(warning)}\n")

    def _load(self, name: str, progress: Progress) -> LoadedModel:
        return run_in_own_thread(lambda: loaders.load(name, self._spec, progress), self._threads)

    def _http(self, precision: str) -> list[MakeContender]:
        return [partial(self._over_http, precision)] if self._options.own_server else []

    async def _over_http(self, precision: str) -> Contender:
        stack = AsyncExitStack()
        server = own_server(self._options, precision, self._spec.slots, self._threads)
        return HttpContender(await stack.enter_async_context(server), precision, stack.aclose)

    @contextmanager
    def _reference(self) -> Iterator[MakersOf]:
        if not self._options.generate:
            yield lambda precision: []
            return
        with WorkerProcess("server.bench.reference") as process:
            load = partial(process.load, settings=self._options.of_model(), threads=self._threads)
            yield lambda precision: [partial(load, "transformers", "transformers", precision=precision)]

    @contextmanager
    def _peers(self) -> Iterator[MakersOf]:
        """Starts the process of the other engines, if requested; deletes its files at the end."""
        if not self._options.peers:
            yield lambda precision: []
            return
        python = environment.ensure(self._options.peers_venv)
        with (
            TemporaryDirectory(prefix="bitdial-peers-") as folder,
            WorkerProcess("server.bench.peers.worker", python) as process,
        ):
            self._report.host["peers"] = process.ask(do="versions")
            exported = run_in_own_thread(lambda: export(self._spec.checkpoint, Path(folder)), self._threads)
            load = partial(process.load, export=str(exported), threads=self._threads)
            yield lambda precision: [
                partial(load, f"{engine} {kind}", engine, kind=kind)
                for engine, kind in PAIRS.get(precision, [])
            ]

    def _show(self, row: Row) -> None:
        self._report.add(row)
        self._table.add(row)
