"""``from_pretrained``, with a check that every tensor of the model comes from the checkpoint."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from loaders.base import ModelSpec, Progress
from loaders.config_check import meta_model_of
from loaders.cuda.memory import refusals
from loaders.errors import CheckpointError, OutOfMemory, in_short

_latest: tuple[Any, PreTrainedModel] | None = None
"""The latest configuration that ``meta_model`` was called for, and its model."""


def load_pretrained(spec: ModelSpec, progress: Progress, **options: Any) -> PreTrainedModel:
    """Returns the model in evaluation mode; ``options`` (``dtype`` …) go to ``from_pretrained``.

    Raises:
        CheckpointError: unreadable, or without some of the model's tensors, which would be random numbers.
        OutOfMemory
    """
    name, refused = spec.checkpoint.model_id, refusals()
    try:
        with _progress_bars_to(progress, "loading"):
            model, report = AutoModelForCausalLM.from_pretrained(
                spec.checkpoint.folder,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # reported, and refused below
                output_loading_info=True,
                **options,
            )
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(f"no room on the device for {name}") from error
    except MemoryError as error:
        raise OutOfMemory(f"no room for {name}") from error
    except Exception as error:  # of any class: from a model class, or from quantizing
        if refusals() > refused:  # the library reports an error in quantizing as the checkpoint's
            raise OutOfMemory(f"no room on the device for {name}") from error
        raise CheckpointError(f"{name} could not be loaded ({in_short(error)})") from error
    _check_complete(name, report)
    model.eval()
    return model


def save_pretrained(model: PreTrainedModel, folder: Path, progress: Progress) -> None:
    """Writes a checkpoint that ``from_pretrained`` reads."""
    with _progress_bars_to(progress, "writing"):
        model.save_pretrained(folder)


def _check_complete(name: str, report: Mapping[str, Any]) -> None:
    """Refuses missing tensors, which the library fills with random numbers, and misshapen ones."""
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"{name} is incomplete: it has no {missing[0]} ({len(missing)} missing in all)")
    if misfits := sorted(key for key, *_ in report["mismatched_keys"]):
        raise misfit(name, misfits)


def misfit(name: str, tensors: Sequence[str]) -> CheckpointError:
    """The error for tensors whose shapes differ from the configuration's."""
    return CheckpointError(
        f"{name} does not fit its config.json: {tensors[0]} has another shape ({len(tensors)} in all)"
    )


def meta_model(spec: ModelSpec) -> PreTrainedModel:
    """The model on the meta device: shapes without weights. Callers share it and change nothing in it."""
    global _latest
    config, latest = spec.checkpoint.config, _latest
    if latest is None or latest[0] is not config:  # each precision asks for it in turn
        _latest = latest = config, meta_model_of(config)
    return latest[1]


@contextlib.contextmanager
def _progress_bars_to(progress: Progress, stage: str) -> Iterator[None]:
    """Within this context, transformers' bar calls ``progress`` instead of being drawn."""

    class Bar:
        def __init__(self, iterable: Any = None, total: int | None = None, **_: Any) -> None:
            self.iterable, self.total, self.n = iterable, total or 0, 0
            if iterable is not None and not self.total:
                self.total = len(iterable) if hasattr(iterable, "__len__") else 0

        def __iter__(self) -> Iterator[Any]:
            for item in self.iterable or ():
                yield item
                self.update()

        def update(self, count: int = 1) -> None:
            self.n += count
            progress(stage, self.n, self.total)

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def __getattr__(self, _: str) -> Any:
            return lambda *_, **__: None

    before = transformers_logging.get_verbosity()
    previous = transformers_logging.set_tqdm_hook(lambda _, args, kwargs: Bar(*args, **kwargs))
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)
        transformers_logging.set_verbosity(before)
