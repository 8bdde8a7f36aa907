"""``bitdial quality``: what each precision costs in quality, measured on a text."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import loaders
from loaders.base import Checkpoint, LoadedModel, ModelSpec
from loaders.errors import LoaderError
from loaders.quality import measure
from loaders.quality.greedy import PROMPTS
from loaders.texts import TextError, held_out, text_file
from server.commands.command_line import FAILED, USAGE, UsageError, complain, parse, require
from server.commands.progress import ProgressBars
from server.commands.table import Row, layer_lines, quality_lines
from server.host import memory
from server.host.threads import compute_with
from server.settings.output import NotSaved, Output, json_option, precisions_option, save
from server.settings.server import ModelSettings
from server.settings.suited import for_suited
from server.settings.types import Precisions, listed, option
from server.terminal import folded, say_json

_WHAT, _HOW, _MORE = "what is measured", "how", "more"
_REFERENCE = "fp32"
_SLOTS = 8  # prompts continued together


class Options(ModelSettings):
    """Measure what each precision costs in quality: one text, all against fp32.

    Prints a table and, to a file or a pipe, one line of JSON last.
    """

    precisions: Precisions | None = precisions_option(_WHAT)
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

    def names(self) -> tuple[str, ...]:
        """The given precisions, or those this host can run; fp32 first if included."""
        names = listed(self.precisions, self.resolved_device())
        return tuple(dict.fromkeys(sorted(names, key=lambda name: name != _REFERENCE)))


def main(arguments: Sequence[str]) -> int:
    try:
        options = parse(Options, "quality", arguments)
        require((_REFERENCE, *options.names()), options.resolved_device())
    except UsageError as error:
        complain("quality", error)
        return USAGE
    from loaders.checkpoint import open_checkpoint  # late: help and usage must not wait for transformers

    try:
        checkpoint = open_checkpoint(options.model_id, options.revision, ProgressBars(options.model_id))
        _show(options, checkpoint, list(_rows(options, checkpoint)))
    except (LoaderError, TextError, NotSaved) as error:
        complain("quality", error)
        return FAILED
    return 0


def _rows(options: Options, checkpoint: Checkpoint) -> Iterator[Row]:
    from loaders.checkpoint import load_tokenizer
    from loaders.layer_errors import layer_errors

    compute_with(options.resolved_threads())
    text = held_out() if options.text is None else text_file(options.text)
    tokenizer = load_tokenizer(checkpoint)
    spec = options.spec(checkpoint, slots=_SLOTS)
    options = for_suited(options, spec)
    reference = _load(_REFERENCE, spec)
    for names in _groups(options.names(), spec):
        models = [reference if name == _REFERENCE else _load(name, spec) for name in names]
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
        for model, quality in zip(models, found, strict=True):
            yield Row(quality, model.footprint, layer_errors(model, spec))
            if model is not reference:
                model.close()


def _load(name: str, spec: ModelSpec) -> LoadedModel:
    model: LoadedModel = _with_bars(name, lambda bars: loaders.load(name, spec, bars))
    return model


def _with_bars(title: str, work: Callable[[ProgressBars], Any]) -> Any:
    bars = ProgressBars(title)
    try:
        return work(bars)
    finally:
        bars.close()


def _groups(names: Sequence[str], spec: ModelSpec) -> Iterator[list[str]]:
    """Groups that fit half of the free memory; a group shares the reference's pass over the text."""
    group: list[str] = []
    room = memory.free_bytes(spec.device) // 2
    for name in names:
        needed = memory.needed_bytes(name, spec)
        if group and needed > room:
            yield group
            group, room = [], memory.free_bytes(spec.device) // 2
        group.append(name)
        room -= needed
    yield group


def _show(options: Options, checkpoint: Checkpoint, rows: Sequence[Row]) -> None:
    first = rows[0].quality
    print(
        folded(
            f"{checkpoint.model_id} on {first.text}: {first.tokens:,} tokens, windows of {first.window} "
            f"at stride {first.stride}, {first.batch} at a time\n"
        )
    )
    print("\n".join(quality_lines(rows)))
    for row in rows:
        if row.layers is not None and options.layers:
            print("\n".join(["", *layer_lines(row.layers)]))
    for row in rows:
        if row.layers is not None and row.layers.warning:
            print("\n" + folded(f"WARNING: {row.layers.warning}"))
    figures = [row.as_dict(options.layers) for row in rows]
    line = json.dumps({"model": checkpoint.model_id, "precisions": figures})
    print()
    say_json(line)
    save(options.json_file, line)
