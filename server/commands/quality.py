"""``bitdial quality``: what each precision costs in quality, measured on a text."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import loaders
from loaders.base import LoadedModel
from loaders.errors import LoaderError
from loaders.quality import measure
from loaders.quality.greedy import PROMPTS
from loaders.texts import Text, TextError, held_out, text_file
from server.commands.command_line import FAILED, USAGE, UsageError, complain, parse, require
from server.commands.measured import (
    REFERENCE,
    Measured,
    MeasuredSettings,
    Measurement,
    find_measured,
    require_consistent,
)
from server.commands.progress import ProgressBars
from server.commands.table import Row, layer_lines, quality_lines
from server.host import memory
from server.host.threads import compute_with
from server.settings.output import NotSaved, Output, json_option, save
from server.settings.types import option
from server.terminal import folded, say_json

_WHAT, _HOW, _MORE = "what is measured", "how", "more"


class Options(MeasuredSettings):
    """Measure what each precision costs in quality: one text, all against fp32.

    Prints a table and, to a file or a pipe, one line of JSON last.
    A checkpoint that is saved quantized is measured against --reference.
    """

    text: Path | None = option(
        None,
        _WHAT,
        "FILE",
        "a text in UTF-8",
        unset="documentation that the bundled model was not trained on",
    )
    window: int | None = option(
        None, _HOW, "N", "tokens computed in one pass", unset="the model's context", ge=2
    )
    stride: int | None = option(None, _HOW, "N", "tokens between passes", unset="half the window", ge=1)
    batch: int | None = option(
        None,
        _HOW,
        "N",
        "windows computed together, at most",
        unset="as many as are faster here",
        ge=1,
    )
    prompts: int = option(PROMPTS, _HOW, "N", "prompts that are continued greedily", ge=0)
    layers: bool = option(False, _MORE, None, "show every layer's quantization error too")
    json_file: Output | None = json_option(_MORE, "write all figures there as well", "nowhere")


def main(arguments: Sequence[str]) -> int:
    try:
        options = parse(Options, "quality", arguments)
        require_consistent(options, arguments)
        require((REFERENCE, *options.names()), options.resolved_device())
        text = held_out() if options.text is None else text_file(options.text)
        measurement = find_measured(options, text, options.window)
        _show(options, measurement, list(_rows(options, measurement, text)))
    except UsageError as error:
        complain("quality", error)
        return USAGE
    except (LoaderError, TextError, NotSaved) as error:
        complain("quality", error)
        return FAILED
    return 0


def _rows(options: Options, measurement: Measurement, text: Text) -> Iterator[Row]:
    from loaders.checkpoint import load_tokenizer  # late: help and usage must not wait for transformers
    from loaders.layer_errors import layer_errors

    compute_with(options.resolved_threads())
    tokenizer = load_tokenizer(measurement.reference.spec.checkpoint)
    reference = _load(measurement.reference, measurement)
    original = measurement.reference.spec.checkpoint
    for group in _groups(measurement.rows):
        models = [reference if one == measurement.reference else _load(one, measurement) for one in group]
        found = _with_bars(
            "quality",
            lambda bars, models=models: measure(  # type: ignore[misc]
                reference,
                models,
                text,
                tokenizer,
                window=options.window,
                stride=options.stride,
                batch=options.batch,
                prompts=options.prompts,
                progress=bars,
            ),
        )
        for one, model, quality in zip(group, models, found, strict=True):
            before = None if one.spec.checkpoint.saved is None else original
            yield Row(one.model, quality, model.footprint, layer_errors(model, one.spec, original=before))
            if model is not reference:
                model.close()


def _load(one: Measured, measurement: Measurement) -> LoadedModel:
    title = one.label if measurement.has_other_models else one.precision
    model: LoadedModel = _with_bars(title, lambda bars: loaders.load(one.precision, one.spec, bars))
    return model


def _with_bars(title: str, work: Callable[[ProgressBars], Any]) -> Any:
    bars = ProgressBars(title)
    try:
        return work(bars)
    finally:
        bars.close()


def _groups(rows: Sequence[Measured]) -> Iterator[list[Measured]]:
    """Groups that fit half of the free memory; a group shares the reference's pass over the text."""
    group: list[Measured] = []
    room = 0
    for row in rows:
        needed = memory.needed_bytes(row.precision, row.spec)
        if group and needed > room:
            yield group
            group = []
        if not group:
            room = memory.free_bytes(row.spec.device) // 2
        group.append(row)
        room -= needed
    yield group


def _show(options: Options, measurement: Measurement, rows: Sequence[Row]) -> None:
    first, original, apart = rows[0].quality, measurement.reference.model, measurement.has_other_models
    models = measurement.models
    against = f" against {REFERENCE} of {original}" if apart else ""
    print(
        folded(
            f"{', '.join(models)}{against} on {first.text}: {first.tokens:,} tokens, windows of "
            f"{first.window} at stride {first.stride}, {first.batch} at a time\n"
        )
    )
    print("\n".join(quality_lines(rows, with_models=apart)))
    for row in rows:
        if row.layers is not None and options.layers:
            print("\n".join(["", *layer_lines(row.layers, row.label if apart else None)]))
    for row in rows:
        if row.layers is not None and row.layers.warning:
            print("\n" + folded(f"WARNING: {f'{row.model}: ' if apart else ''}{row.layers.warning}"))
    figures = [row.as_dict(options.layers) for row in rows]
    one = models[0] if len(models) == 1 else None
    line = json.dumps({"model": one, "reference": original, "precisions": figures})
    print()
    say_json(line)
    save(options.json_file, line)
