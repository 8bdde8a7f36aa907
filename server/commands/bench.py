"""``bitdial bench``: the measurement of a model on this host."""

from collections.abc import Sequence

from loaders.base import LoaderError
from server.bench.errors import BenchError
from server.bench.options import Options
from server.commands import FAILED, USAGE, UsageError, complain, parse, require
from server.commands.progress import ProgressBars

__all__ = ["Options", "main"]


def main(arguments: Sequence[str]) -> int:
    try:
        options = parse(Options, "bench", arguments)
        require(options.names(), options.resolved_device())
    except UsageError as error:
        complain("bench", error)
        return USAGE
    from loaders.checkpoint import open_checkpoint  # late: help and usage needn't wait for transformers
    from server.bench.main import bench

    try:
        checkpoint = open_checkpoint(options.model_id, options.revision, ProgressBars(options.model_id))
        bench(options, checkpoint, ProgressBars)
    except (LoaderError, BenchError) as error:
        complain("bench", error)
        return FAILED
    return 0
