"""Opens the models that ``bitdial serve`` is to serve, before the server starts."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loaders.base import Checkpoint
from server.commands.command_line import UsageError, for_saved
from server.commands.progress import ProgressBars
from server.errors import ServiceError
from server.report.choice import Choice
from server.settings.server import Settings
from server.settings.types import AUTO, ModelSource, model_sources

if TYPE_CHECKING:
    from server.served_model import Wanted


def open_models(options: Settings, arguments: Sequence[str]) -> list[Wanted]:
    """The models, the default one first, each with its checkpoint opened.

    Args:
        arguments: the command line.

    Raises:
        UsageError: options contradict each other, or two models have one name.
        LoaderError: a model can't be had.
    """
    wanted = [_open(options, source) for source in _sources(options, arguments)]
    names = Counter(one.name or one.open().model_id for one in wanted)
    if twice := [name for name, count in names.items() if count > 1]:
        raise UsageError(f"two models are named {twice[0]}: give one another name, as in other=FOLDER")
    return wanted


def _sources(options: Settings, arguments: Sequence[str]) -> list[ModelSource]:
    """Raises: UsageError, for options that are of one model, beside several."""
    if options.models is None:
        return [ModelSource(options.model_id, None)]
    given = {argument.partition("=")[0] for argument in arguments}
    set_ = {
        "--model": bool({"--model", "--model-id"} & given),  # a container's MODEL_ID gives way
        "--revision": options.revision is not None,
        "--chat-template": options.chat_template is not None,
    }
    of_one = [name for name, is_set in set_.items() if is_set]
    if of_one:
        raise UsageError(f"{of_one[0]} is of one model: not with --models (or MODELS)")
    return model_sources(options.models)


def _open(options: Settings, model: ModelSource) -> Wanted:
    from loaders.checkpoint import (  # late: help and usage must not wait for transformers
        load_tokenizer,
        open_checkpoint,
    )
    from server.served_model import Wanted

    options = options.model_copy(update={"model_id": model.source})
    checkpoint = open_checkpoint(options.model_id, options.revision, ProgressBars(options.model_id))
    load_tokenizer(checkpoint)
    settings, choice = _resolve_default(for_saved(options, checkpoint), checkpoint)
    return Wanted(lambda: checkpoint, settings, choice, model.name)


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
