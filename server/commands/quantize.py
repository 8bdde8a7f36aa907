"""``bitdial quantize``: makes a precision's files once, so that later starts skip the work."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import loaders
from loaders.base import ModelSpec
from loaders.errors import LoaderError, PrecisionUnavailable
from loaders.foreign_errors import as_loader_errors
from server.commands.command_line import FAILED, USAGE, UsageError, complain, parse, require
from server.commands.interrupts import clean_up_on_interrupt
from server.commands.progress import ProgressBars
from server.host.threads import compute_with
from server.settings.model import ModelSettings
from server.settings.types import Precision, option

_WHAT, _WRITTEN = "what is made", "what is written"


class Options(ModelSettings):
    """Make a precision of a model once, and save it.

    Without --out the files go to the cache that bitdial serve and the other
    commands read. With it they become a checkpoint of their own: give its
    folder as --model. int8, nf4 and fp4 are saved as transformers reads them.
    """

    method: Precision | None = option(None, _WHAT, "PRECISION", "the precision to make", unset="required")
    steps: int = option(
        ModelSpec.training_steps, _WHAT, "N", "qat-int8, qat-int4: updates of the weights in training", ge=1
    )
    granularity: Literal["group", "channel"] = option(
        ModelSpec.granularity,
        _WHAT,
        "group|channel",
        "qat-int8: what shares a scale: groups of weights, which is most exact here, or the weights of an "
        "output, which LiteRT keeps",
    )
    out: Path | None = option(
        None,
        _WRITTEN,
        "PATH",
        "a new folder; or a file that ends in .tflite or .onnx, for that file alone",
        unset="the cache alone",
    )


def main(arguments: Sequence[str]) -> int:
    try:
        options = parse(Options, "quantize", arguments)
        made_by = _require(options)
        with clean_up_on_interrupt():
            print(_quantize(options, options.method or "", made_by))
    except UsageError as error:
        complain("quantize", error)
        return USAGE
    except LoaderError as error:
        complain("quantize", error)
        return FAILED
    return 0


def _require(options: Options) -> loaders.Maker:
    """The functions that make the files.

    Raises:
        UsageError: the precision has none, this host can't run it, or the place is taken.
    """
    if options.method is None:
        raise UsageError(f"--method is missing: {', '.join(_makers())}")
    if (made_by := loaders.maker(options.method)) is None:
        raise UsageError(
            f"--method: {options.method} has no files to make; these have: {', '.join(_makers())}"
        )
    require([options.method], options.resolved_device())
    if options.out is None:
        if not loaders.is_prepared(options.method):
            raise UsageError(
                f"--method: {options.method} is made while it is loaded and not cached; --out FOLDER saves it"
            )
    elif options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise UsageError(f"--out: {options.out.name!r} exists")
    return made_by


def _makers() -> list[str]:
    return [name for name in loaders.PRECISIONS if loaders.maker(name) is not None]


def _quantize(options: Options, method: str, made_by: loaders.Maker) -> str:
    """Makes the files; returns the line that says where they are."""
    from loaders.artifacts import prepare  # late: help and usage must not wait for transformers
    from loaders.artifacts.saving import save
    from loaders.checkpoint import load_tokenizer, open_checkpoint

    with ProgressBars(options.model_id) as bars:
        checkpoint = open_checkpoint(options.model_id, options.revision, bars)
        load_tokenizer(checkpoint)
    spec = replace(
        options.spec(checkpoint, slots=1), training_steps=options.steps, granularity=options.granularity
    )
    remark = _remark(options, method, spec)
    if not (able := loaders.suitability(method, spec)).ok:
        raise PrecisionUnavailable(method, able)
    recipe = made_by.recipe(method, spec)
    make = partial(made_by.make, method, spec)
    compute_with(options.resolved_threads())
    with ProgressBars(method) as bars, as_loader_errors(method, checkpoint.model_id):
        if options.out is not None:
            save(spec, recipe, make, options.out.absolute(), bars)
            return _saved(method, options.out, remark)
        folder = prepare(spec, recipe, make, bars)
    return f"{method} of {checkpoint.model_id} is in the cache: {folder}"


def _remark(options: Options, method: str, spec: ModelSpec) -> str | None:
    """What the conversion of a saved checkpoint loses.

    Raises:
        LoaderError: it can't be converted.
        UsageError: it can be, but nothing keeps the files.
    """
    checkpoint = spec.checkpoint
    if checkpoint.saved is None:
        return None
    conversion = loaders.converter(method, checkpoint.saved)
    if conversion is None:
        raise LoaderError(f"{checkpoint.model_id} is saved in {checkpoint.saved} already")
    if options.out is None:
        raise UsageError(
            f"--out is missing: what is made of a saved checkpoint ({checkpoint.saved}) isn't cached"
        )
    return conversion.remark(method, spec)


def _saved(method: str, where: Path, remark: str | None) -> str:
    size = sum(path.stat().st_size for path in where.rglob("*")) if where.is_dir() else where.stat().st_size
    serve = f"\n  bitdial serve --model {where}" if where.is_dir() else ""
    note = f"\n  {remark}" if remark else ""
    return f"{method} is saved in {where} ({size / 1e6:,.1f} MB){note}{serve}"
