"""``bitdial precisions``: which precisions this host can run."""

from collections.abc import Sequence

import loaders
from loaders.base import Checkpoint, ModelSpec
from loaders.errors import LoaderError
from server.commands.command_line import FAILED, USAGE, UsageError, complain, parse, require
from server.commands.progress import ProgressBars
from server.commands.table import layer_lines
from server.host.threads import compute_with
from server.settings.server import ModelSettings
from server.settings.types import ALL, Precisions, listed, option
from server.tables import NONE, aligned


class Options(ModelSettings):
    """List every precision: can this host run it, why not, and what its weights take."""

    layers: Precisions | None = option(
        None,
        "more",
        "NAMES",
        "load these, by comma, or all, and report layer by layer what is quantized",
        unset="none is loaded",
    )

    def names(self) -> tuple[str, ...]:
        """The precisions to load."""
        return () if self.layers is None else listed(self.layers, self.resolved_device())


def main(arguments: Sequence[str]) -> int:
    try:
        options = parse(Options, "precisions", arguments)
        require(options.names(), options.resolved_device())
        from loaders.checkpoint import open_checkpoint  # late: help and usage must not wait for transformers

        checkpoint = open_checkpoint(options.model_id, options.revision, ProgressBars(options.model_id))
    except UsageError as error:
        complain("precisions", error)
        return USAGE
    except LoaderError as error:
        complain("precisions", error)
        return FAILED
    spec = options.spec(checkpoint, slots=1)
    _list(checkpoint, spec)
    compute_with(options.resolved_threads())
    try:
        for name in _to_load(options, spec):
            _report_layers(name, spec)
    except LoaderError as error:
        complain("precisions", error)
        return FAILED
    return 0


def _to_load(options: Options, spec: ModelSpec) -> tuple[str, ...]:
    """Of ``all`` those that can be made of the checkpoint: the list has the reasons against the others."""
    names = options.names()
    return tuple(name for name in names if options.layers != ALL or loaders.suitability(name, spec).ok)


def _list(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    device = spec.device
    print(
        f"{checkpoint.model_id} ({checkpoint.architecture}) on {device}; weights before loading, estimated\n"
    )
    rows = [["precision", "weights", "aliases", "here"]]
    for name in loaders.PRECISIONS:
        able = loaders.offered(name, spec)
        size = f"{loaders.loader(name).estimate_bytes(name, spec) / 1e6:,.1f} MB" if able.ok else NONE
        fix = f"; mend it with: {able.install}" if able.install else ""
        here = _served(name, spec) if able.ok else f"no: {able.reason}{fix}"
        rows.append([name, size, ", ".join(loaders.aliases(name)), here])
    print("\n".join(aligned(rows, left=(0, 2, 3))))


def _served(name: str, spec: ModelSpec) -> str:
    if not loaders.is_prepared(name):
        return "yes"
    from loaders.artifacts import is_made  # late: help and usage must not wait for transformers

    if is_made(name, spec):
        return "yes; its files are made"
    return "yes; its files are made first, by bitdial quantize or at the first load"


def _report_layers(name: str, spec: ModelSpec) -> None:
    from loaders.layer_errors import layer_errors

    bars = ProgressBars(name, quiet=True)
    try:
        model = loaders.load(name, spec, bars)
        report = layer_errors(model, spec, bars)
    finally:
        bars.close()
    print()
    if report is None:
        print(f"{name}: its layers can't be inspected")
    else:
        print("\n".join(layer_lines(report)))
        if report.warning is not None:
            print(f"\nWARNING: {report.warning}")
    model.close()
