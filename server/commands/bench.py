"""``bitdial bench``: measures a model on this host."""

import signal
from collections.abc import Sequence
from functools import partial

from loaders.base import Checkpoint
from loaders.errors import LoaderError
from server.bench.errors import BenchError
from server.bench.options import Options
from server.commands.command_line import FAILED, USAGE, UsageError, complain, parse, require
from server.commands.progress import ProgressBars
from server.settings.output import NotSaved

__all__ = ["Options", "main"]


def main(arguments: Sequence[str]) -> int:
    try:
        options = parse(Options, "bench", arguments)
        if options.server_url is None:
            require(options.names(), options.resolved_device())
    except UsageError as error:
        complain("bench", error)
        return USAGE
    from server.bench.main import bench  # late: help and usage must not wait for transformers

    signal.signal(signal.SIGINT, signal.default_int_handler)  # child processes are stopped
    try:
        bench(options, partial(_open, options), ProgressBars)
    except (LoaderError, BenchError, NotSaved) as error:
        complain("bench", error)
        return FAILED
    return 0


def _open(options: Options) -> Checkpoint:
    from loaders.checkpoint import open_checkpoint

    return open_checkpoint(options.model_id, options.revision, ProgressBars(options.model_id))
