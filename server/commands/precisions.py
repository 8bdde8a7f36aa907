"""``bitdial precisions``: the registry as this host sees it."""

from collections.abc import Sequence

import loaders
from loaders.base import LoaderError
from server.commands import FAILED, USAGE, UsageError, complain, parse
from server.commands.progress import ProgressBars
from server.settings import ModelSettings


class Options(ModelSettings):
    """List every precision: can this host run it, why not, and what its weights take."""


def main(arguments: Sequence[str]) -> int:
    try:
        options = parse(Options, "precisions", arguments)
        from loaders.checkpoint import open_checkpoint  # late: help and usage needn't wait for transformers

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
    wide = max(len(_aliases(name)) for name in loaders.PRECISIONS)
    print(f"{'precision':<14}{'weights':>12}  {'aliases':<{wide}}  here")
    for name in loaders.PRECISIONS:
        able = loaders.availability(name, device)
        size = f"{loaders.loader(name).estimate_bytes(name, spec) / 1e6:,.1f} MB" if able.ok else "–"
        mend = f"; mend it with: {able.install}" if able.install else ""
        here = "yes" if able.ok else f"no: {able.reason}{mend}"
        print(f"{name:<14}{size:>12}  {_aliases(name):<{wide}}  {here}")
    return 0


def _aliases(name: str) -> str:
    return ", ".join(loaders.aliases(name))
