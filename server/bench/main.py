"""``bitdial bench`` from its options to its last line."""

from collections.abc import Callable

import torch

from loaders.base import Checkpoint, ModelSpec
from server.bench import report as reports
from server.bench.engines import Engines, ProgressOf
from server.bench.errors import BenchError
from server.bench.host import MemorySpeed, pin
from server.bench.options import Options
from server.bench.report import Report
from server.bench.serving.section import Serving


def bench(options: Options, open_checkpoint: Callable[[], Checkpoint], progress_of: ProgressOf) -> None:
    """Measures and prints; the JSON line comes last, with what there is if the measurement breaks off.

    Args:
        open_checkpoint: called unless somebody's server is what is measured.

    Raises:
        BenchError, LoaderError
    """
    cpus = pin(options.threads)
    if options.server_url is not None:
        report = Report(reports.client_facts(cpus), {"url": options.server_url}, options.shown())
        _reported(report, options, Serving(options, report).measure)
        return
    spec = _spec(options, open_checkpoint())
    speed = MemorySpeed(spec.device, torch.get_num_threads())
    facts = reports.host_facts(cpus, speed.measure(), speed.buffer_bytes)
    report = Report(facts, reports.model_facts(spec.checkpoint), options.shown())
    print(reports.introduction(report), flush=True)

    def everything() -> None:
        Engines(options, spec, speed, report, progress_of).measure()
        if options.own_server:
            Serving(options, report).measure()

    _reported(report, options, everything)


def _reported(report: Report, options: Options, measure: Callable[[], None]) -> None:
    try:
        measure()
    finally:
        print(report.write(options.json_file), flush=True)


def _spec(options: Options, checkpoint: Checkpoint) -> ModelSpec:
    most = max(*options.batch_sizes, *(options.stream_counts if options.own_server else ()), 1)
    spec = options.spec(checkpoint, slots=most)
    if options.prompt + options.tokens > spec.max_tokens:
        raise BenchError(
            f"--prompt {options.prompt} and --tokens {options.tokens} exceed the context of {spec.max_tokens}"
        )
    return spec
