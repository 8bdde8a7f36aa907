"""Every precision's engine and those it is compared with: the main table."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, AsyncExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import loaders
from loaders.base import LoadedModel, ModelSpec, ignore_progress
from loaders.checkpoint import load_tokenizer
from loaders.errors import CheckpointError
from loaders.texts import TextError, held_out, text_file
from server.bench import comparison, table
from server.bench.bandwidth import MemorySpeed
from server.bench.contenders import Contender
from server.bench.document import Report
from server.bench.errors import BenchError
from server.bench.http.contender import HttpContender
from server.bench.http.own_server import own_server
from server.bench.options import Options
from server.bench.peers import environment
from server.bench.peers.export import export
from server.bench.peers.worker import PAIRS
from server.bench.processes import WorkerProcess
from server.bench.quality import WINDOW, Qualities, excerpt
from server.bench.reference import REFERENCES
from server.bench.session import MakeContender, Plan, Progress, Row, Session
from server.bench.table import PrintedTable
from server.host.threads import run_in_own_thread
from server.settings.output import save
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
        qualities = self._qualities()
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
            if qualities is not None:
                self._measure_quality(qualities, lambda name: [*reference(name), *peers(name)])
        self._compare(qualities)

    def _qualities(self) -> Qualities | None:
        """Raises: BenchError, if the text can't be scored; so this comes first."""
        if not self._options.quality_tokens:
            return None
        checkpoint, path = self._spec.checkpoint, self._options.text
        try:
            tokenizer = load_tokenizer(checkpoint)
        except CheckpointError as error:
            say(f"{folded(f'The quality is not measured: {error}')}\n")
            return None
        try:
            text = held_out() if path is None else text_file(path)
            text = excerpt(text, tokenizer, self._options.quality_tokens)
        except TextError as error:
            raise BenchError(str(error)) from error
        spec = replace(self._spec, slots=1)
        load = partial(self._load, progress=ignore_progress, spec=spec)
        return Qualities(load, text, tokenizer, spec.max_tokens, checkpoint.vocabulary, self._threads)

    def _measure_quality(self, qualities: Qualities, others: MakersOf) -> None:
        try:
            with self._progress_of("quality") as progress, qualities.reference() as is_trained:
                if is_trained:
                    names = self._options.names()
                    for done, name in enumerate(names):
                        progress(f"scoring {name}", done, len(names))
                        asyncio.run(qualities.add(name, others(name)))
        except TextError as error:
            raise BenchError(str(error)) from error
        self._report.sections["quality"] = qualities.figures()
        say(f"{folded(qualities.heading())}\n")

    def _compare(self, qualities: Qualities | None) -> None:
        """Prints the table of speed beside quality, and writes it where it is asked for."""
        found = comparison.lines(self._table.rows, {} if qualities is None else qualities.shown)
        self._report.sections["comparison"] = [line.figures() for line in found]
        printed = PrintedTable(comparison.columns(found), 2, comparison.legend(found))
        for line in found:
            printed.add(line)
        printed.end()
        save(self._options.markdown, comparison.markdown(found), "--markdown")

    def _load(self, name: str, progress: Progress, spec: ModelSpec | None = None) -> LoadedModel:
        return run_in_own_thread(lambda: loaders.load(name, spec or self._spec, progress), self._threads)

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
            make = partial(load, "transformers", "transformers")
            yield lambda precision: [partial(make, precision=precision)] if precision in REFERENCES else []

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
            longest = max(self._options.prompt + self._options.tokens, WINDOW)
            exported = run_in_own_thread(
                lambda: export(self._spec.checkpoint, Path(folder), longest), self._threads
            )
            load = partial(process.load, export=str(exported.folder), threads=self._threads)
            yield lambda precision: [
                partial(load, f"{engine} {kind}", engine, kind=kind)
                for engine, kind in PAIRS.get(precision, [])
                if engine in exported.engines
            ]

    def _show(self, row: Row) -> None:
        self._report.add(row)
        self._table.add(row)
