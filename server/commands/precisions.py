"""``bitdial precisions``: the registry as this host sees it."""

from collections.abc import Sequence

import loaders
from loaders.base import LoaderError
from loaders.checkpoint import open_checkpoint
from server.commands import FAILED, USAGE, ProgressBars, UsageError, complain, parse
from server.settings import ModelSettings


class Options(ModelSettings):
    """List every precision: whether this host can run it, why not, and the bytes the weights take."""


def main(arguments: Sequence[str]) -> int:
    try:
        options = parse(Options, "precisions", arguments)
        checkpoint = open_checkpoint(options.model_id, options.revision, ProgressBars(options.model_id))
    except UsageError as error:
        complain("precisions", error)
        return USAGE
    except LoaderError as error:
        complain("precisions", error)
        return FAILED
    spec = options.spec(checkpoint, slots=1)
    device = spec.device
    print(
        f"{checkpoint.model_id} ({checkpoint.architecture}) on {device}; weights before loading, estimated\n"
    )
    print(f"{'precision':<14}{'weights':>12}  {'aliases':<38} here")
    for name in loaders.PRECISIONS:
        able = loaders.availability(name, device)
        size = f"{loaders.loader(name).estimate_bytes(name, spec) / 1e6:,.1f} MB" if able.ok else "–"
        mend = f"; mend it with: {able.install}" if able.install else ""
        here = "yes" if able.ok else f"no: {able.reason}{mend}"
        print(f"{name:<14}{size:>12}  {', '.join(loaders.aliases(name)):<38} {here}")
    return 0
