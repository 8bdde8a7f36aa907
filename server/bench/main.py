"""Runs ``bitdial bench``: all parts in order, then the JSON."""

import asyncio
from collections.abc import Callable
from dataclasses import asdict

import loaders
from loaders.base import Checkpoint, ModelSpec
from server.bench import contexts, loading
from server.bench import document as reports
from server.bench.bandwidth import MemorySpeed
from server.bench.document import Report
from server.bench.engines import Engines, ProgressOf
from server.bench.errors import BenchError
from server.bench.http.section import Serving
from server.bench.options import Options
from server.bench.table import PrintedTable
from server.host.cpu import pin
from server.host.threads import run_in_own_thread
from server.settings.output import save
from server.settings.suited import for_suited
from server.terminal import folded, say, say_json


def bench(options: Options, open_checkpoint: Callable[[], Checkpoint], progress_of: ProgressOf) -> None:
    """Measures and prints; the JSON comes last, also after an error.

    Args:
        open_checkpoint: not called if an external server is measured.

    Raises:
        BenchError, LoaderError, NotSaved
    """
    threads = options.resolved_threads()
    cpus = pin(threads)
    if options.server_url is not None:
        report = Report(reports.client_facts(cpus), {"url": options.server_url}, options.shown())
        parts = [Serving(options, report).measure]
    else:
        spec = _spec(options, open_checkpoint())
        options = for_suited(options, spec)
        speed = MemorySpeed(spec.device, threads)
        facts = reports.host_facts(cpus, threads, speed.measure(), speed.buffer_bytes)
        report = Report(facts, reports.model_facts(spec.checkpoint), options.shown())
        say(folded(reports.introduction(report)))
        parts = _parts(options, spec, speed, report, progress_of)
    try:
        for part in parts:
            part()
    finally:
        say_json(report.line())
        save(options.json_file, report.text())


def _parts(
    options: Options, spec: ModelSpec, speed: MemorySpeed, report: Report, progress_of: ProgressOf
) -> list[Callable[[], None]]:
    """The requested parts, in order."""
    parts: list[Callable[[], None]] = []
    if options.engines:
        parts.append(Engines(options, spec, speed, report, progress_of).measure)
    if options.own_server:
        parts.append(Serving(options, report).measure)
    if options.loading:
        parts.append(lambda: _loading(options, report))
    if options.contexts:
        parts.append(lambda: _contexts(options, spec, report, progress_of))
    return parts


def _loading(options: Options, report: Report) -> None:
    table = PrintedTable(loading.COLUMNS, 1, loading.LEGEND)
    rows = report.sections["loading"] = []
    for name in options.names():
        measured = loading.measure_loading(name, options.of_model(), report.host["threads"])
        rows.append(measured.figures())
        table.add(measured)
    table.end()


def _contexts(options: Options, spec: ModelSpec, report: Report, progress_of: ProgressOf) -> None:
    threads, table = report.host["threads"], PrintedTable(contexts.COLUMNS, 1, contexts.LEGEND)

    async def measure(name: str) -> None:
        with progress_of(name) as progress:
            loaded = run_in_own_thread(lambda: loaders.load(name, spec, progress), threads)
        async for cost in contexts.measure_contexts(loaded, options.context_lengths, options.repeat, threads):
            table.add(cost)

    for name in options.names():
        asyncio.run(measure(name))
    report.sections["contexts"] = [asdict(cost) for cost in table.rows]
    table.end()
    if options.plot is not None:
        title = f"{report.model['name']} on {report.host['cpu']}, {threads} threads"
        say(contexts.plot(table.rows, title, options.plot) + "\n")


def _spec(options: Options, checkpoint: Checkpoint) -> ModelSpec:
    """Raises: BenchError, if a requested length exceeds the model's context."""
    most = max(*options.batch_sizes, *(options.stream_counts if options.own_server else ()), 1)
    spec = options.spec(checkpoint, slots=most)
    for context in options.context_lengths:
        contexts.tokens_after(context, spec.max_tokens)
    if options.prompt + options.tokens > spec.max_tokens:
        raise BenchError(
            f"--prompt {options.prompt} and --tokens {options.tokens} exceed the context of {spec.max_tokens}"
        )
    return spec
