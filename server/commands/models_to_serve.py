"""Opens the models that ``bitdial serve`` is to serve, before the server starts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

import loaders
from loaders.base import Checkpoint
from loaders.errors import PrecisionUnavailable
from server.commands.command_line import UsageError, for_saved
from server.commands.progress import ProgressBars
from server.errors import ServiceError
from server.report.choice import Choice
from server.settings.models import ModelSource, sources_of
from server.settings.server import Settings
from server.settings.types import ALL, AUTO

if TYPE_CHECKING:
    from server.served_model import Wanted


def named_models(options: Settings, arguments: Sequence[str]) -> list[ModelSource]:
    """The models that the options name, the default one first.

    Args:
        arguments: the command line.

    Raises:
        UsageError: options contradict each other, or two models have one name.
    """
    given = {argument.partition("=")[0] for argument in arguments}
    # a container's MODEL_ID gives way
    if options.models is not None and {"--model", "--model-id"} & given:
        raise UsageError("--model is of one model: not with --models (or MODELS)")
    try:
        return sources_of(options)
    except ValueError as error:
        raise UsageError(str(error)) from None


def open_models(options: Settings, sources: Sequence[ModelSource]) -> list[Wanted]:
    """The models, the default one first, each with its checkpoint opened.

    Raises:
        UsageError: an option is not for such a model.
        LoaderError: a model can't be had.
    """
    found = [_open(options, source, several=len(sources) > 1) for source in sources]
    for wanted in found:
        _require_suited(wanted, is_default=wanted is found[0])
    return found


def _require_suited(wanted: Wanted, is_default: bool) -> None:
    """Checks that the precisions that the settings name for the model can be made of it.

    Raises:
        UsageError: one can't be; the server, or that model, would never be ready.
    """
    settings, checkpoint = wanted.settings, wanted.open()
    names: tuple[str | None, ...] = (settings.precision, settings.shadow_precision)
    if is_default and settings.precisions != ALL:
        names = settings.required_precisions()
    for name in filter(None, dict.fromkeys(names)):
        able = loaders.offered(name, settings.spec(checkpoint, slots=1))
        if not able.ok:
            raise UsageError(f"{checkpoint.model_id}: {PrecisionUnavailable(name, able)}")


def _open(options: Settings, source: ModelSource, several: bool) -> Wanted:
    from loaders.checkpoint import (  # late: help and usage must not wait for transformers
        load_tokenizer,
        open_checkpoint,
    )
    from server.served_model import Wanted

    options = source.settings(options)
    checkpoint = open_checkpoint(options.model_id, options.revision, ProgressBars(options.model_id))
    load_tokenizer(checkpoint)
    settings, choice = _resolve_default(for_saved(options, checkpoint, beside_others=several), checkpoint)
    return Wanted(lambda: checkpoint, settings, choice, source.name)


def _resolve_default(options: Settings, checkpoint: Checkpoint) -> tuple[Settings, Choice | None]:
    """The settings with ``auto`` replaced by a precision, and the report's choice that gave it."""
    if options.precision != AUTO:
        return options, None
    from server.report.auto import resolve_default
    from server.report.background import Reports

    reports = Reports(options, checkpoint)
    asyncio.run(reports.find_subject())
    try:
        settings, choice = resolve_default(options, reports)
    except ServiceError as error:
        raise UsageError(f"--precision (or PRECISION) auto: {error.message}") from None
    print(f"auto: {choice.reason if choice else settings.precision}", flush=True)
    return settings, choice
