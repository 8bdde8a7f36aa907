"""``bitdial explain``: a layer's weights before and after quantization, for each scheme."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from loaders.affine.method import Method
from loaders.base import Checkpoint
from loaders.errors import LoaderError
from server.commands.command_line import FAILED, USAGE, UsageError, complain, parse
from server.commands.explain import schemes as known
from server.commands.progress import ProgressBars
from server.host.threads import compute_with
from server.report import plots
from server.report.plots import PlotsUnavailable
from server.settings.output import NotSaved, Output, json_option, save
from server.settings.server import ModelSettings
from server.settings.types import option, parse_names
from server.terminal import say

_WHAT, _MORE = "what is explained", "more"


def _known(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise ValueError("it names no scheme")
    for name in names:
        known.parse(name)
    return tuple(dict.fromkeys(names))


def _place(value: str) -> str:
    if not re.fullmatch(r"\d+,\d+", value):
        raise ValueError(f"{value!r} is not ROW,COLUMN")
    return value


def _picture(path: Path) -> Path:
    if path.suffix.lower() not in (".svg", ".png"):
        raise ValueError(f"{path.name!r} must end in .svg or .png")
    return path


class Options(ModelSettings):
    """Show a layer's weights before and after quantization: their distribution,
    scale, zero point, clipping, error and bits, for each scheme.

    Without --layer, list the layers with the largest errors and show the first.
    """

    layer: str | None = option(
        None, _WHAT, "NAME", "a layer, or the end of its name", unset="the one with the largest error"
    )
    schemes: Annotated[tuple[str, ...], BeforeValidator(parse_names), AfterValidator(_known)] | None = option(
        None,
        _WHAT,
        "NAMES",
        "by comma; int8 or int4 (symmetric), int8-full, uint8 (asymmetric) …, then -tensor, -channel or the "
        "size of a group, then -mse, or per tensor -percentile or -kl; nf4 or fp4, "
        "with -nested for scales in eight bits; int4-table, the format of the precision int4, not calibrated",
        unset="fifteen common ones",
    )
    weight: Annotated[str, AfterValidator(_place)] | None = option(
        None, _WHAT, "ROW,COLUMN", "the weight whose bits are shown", unset="one of median magnitude"
    )
    out: Annotated[Output, AfterValidator(_picture)] | None = option(
        None, _MORE, "FILE", "draw the same there, as SVG or PNG", unset="nowhere"
    )
    json_file: Output | None = json_option(_MORE, "write all figures there", "nowhere")

    def quantizers(self) -> list[Method]:
        return [known.parse(name) for name in self.schemes or known.COMMON]

    def place(self) -> tuple[int, int] | None:
        """(row, column) of ``--weight``."""
        if self.weight is None:
            return None
        row, column = map(int, self.weight.split(","))
        return row, column


def main(arguments: Sequence[str]) -> int:
    try:
        options = parse(Options, "explain", arguments)
        if options.out is not None:
            plots.require()
    except (UsageError, PlotsUnavailable) as error:
        complain("explain", error)
        return USAGE
    from loaders.checkpoint import open_checkpoint  # late: help and usage must not wait for transformers
    from server.commands.explain.layers import NoSuchLayer

    try:
        checkpoint = open_checkpoint(options.model_id, options.revision, ProgressBars(options.model_id))
        compute_with(options.resolved_threads())
        _explain(options, checkpoint)
    except (NoSuchLayer, UsageError) as error:
        complain("explain", error)
        return USAGE
    except (LoaderError, NotSaved) as error:
        complain("explain", error)
        return FAILED
    return 0


def _explain(options: Options, checkpoint: Checkpoint) -> None:
    from server.commands.explain import figure, text
    from server.commands.explain.explanation import as_dict, explain
    from server.commands.explain.layers import Layers

    with (
        Layers(options.spec(checkpoint, slots=1)) as layers,
        ProgressBars(checkpoint.model_id, quiet=True) as bars,
    ):
        quantizers = options.quantizers()
        ranking = layers.ranking(quantizers[0], bars) if options.layer is None else []
        name = ranking[0].name if options.layer is None else layers.find(options.layer)
        found = explain(layers, name, quantizers, options.place(), bars)
        bars.close()
        if ranking:
            say("\n".join(text.ranking_lines(ranking, quantizers[0].name)) + "\n")
    say("\n".join(text.lines(found, checkpoint.model_id)))
    save(options.json_file, json.dumps({"model": checkpoint.model_id, **as_dict(found, ranking)}))
    if options.out is not None:
        figure.draw(found, checkpoint.model_id, options.out)
