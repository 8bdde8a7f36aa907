"""The registry of precisions: one module each, imported when first asked for.

A new precision is one module with ``availability(device)`` and ``load(spec, progress)`` and one line here.
"""

import logging
import time
from importlib import import_module
from typing import Any, Literal, Protocol, cast

import torch

from loaders.base import Availability, Checkpoint, LoadedModel, ModelSpec, Progress, ignore_progress
from loaders.errors import (
    CheckpointError,
    LoaderError,
    OutOfMemory,
    PrecisionUnavailable,
    UnknownPrecision,
    in_short,
)
from loaders.malloc import large_blocks_returned

__all__ = [
    "ALIASES",
    "PRECISIONS",
    "Availability",
    "Checkpoint",
    "LoadedModel",
    "LoaderError",
    "ModelSpec",
    "availability",
    "canonical",
    "load",
]

_log = logging.getLogger(__name__)

PRECISIONS: dict[str, str] = {
    "fp32": "loaders.precisions.full",
    "bf16": "loaders.precisions.full",
    "fp16": "loaders.precisions.full",
    "int8": "loaders.precisions.bnb",
    "nf4": "loaders.precisions.bnb",
    "fp4": "loaders.precisions.bnb",
    "dynamic-int8": "loaders.precisions.dynamic_int8",
}
ALIASES: dict[str, str] = {
    "8bit": "int8",
    "8-bit": "int8",
    "bnb-8bit": "int8",
    "bitsandbytes": "int8",
    "4bit": "nf4",
    "4-bit": "nf4",
    "bnb-4bit": "nf4",
    "bitsandbytes-nf4": "nf4",
    "bitsandbytes-fp4": "fp4",
}


class Loader(Protocol):
    """What each module of the registry offers."""

    def availability(self, precision: str, device: Literal["cpu", "cuda"]) -> Availability: ...

    def load(self, precision: str, spec: ModelSpec, progress: Progress) -> LoadedModel: ...

    def estimate_bytes(self, precision: str, spec: ModelSpec) -> int:
        """Weight bytes it will need, before anything is loaded; used only to decide what fits."""
        ...


def canonical(name: object) -> str:
    """The registry's name for a precision or alias.

    Raises:
        UnknownPrecision: it is neither; the error lists the choices.
    """
    if isinstance(name, str) and (known := ALIASES.get(name, name)) in PRECISIONS:
        return known
    raise UnknownPrecision(name, list(PRECISIONS))


def aliases(precision: str) -> list[str]:
    return [alias for alias, name in ALIASES.items() if name == precision]


def loader(precision: str) -> Loader:
    return cast(Loader, cast(Any, import_module(PRECISIONS[canonical(precision)])))


def availability(precision: str, device: Literal["cpu", "cuda"]) -> Availability:
    """Whether this host can run ``precision`` on ``device``."""
    return loader(precision).availability(canonical(precision), device)


def available(device: Literal["cpu", "cuda"]) -> tuple[str, ...]:
    """The precisions that this host can run on ``device``, in the registry's order."""
    return tuple(name for name in PRECISIONS if availability(name, device).ok)


def load(precision: str, spec: ModelSpec, progress: Progress = ignore_progress) -> LoadedModel:
    """Loads one precision of ``spec.checkpoint``.

    Raises:
        UnknownPrecision, PrecisionUnavailable, CheckpointError, OutOfMemory
    """
    name = canonical(precision)
    able = availability(name, spec.device)
    if not able.ok:
        raise PrecisionUnavailable(name, able)
    started = time.perf_counter()
    try:
        with large_blocks_returned():
            model = loader(name).load(name, spec, progress)
    except LoaderError:
        raise
    except torch.OutOfMemoryError as error:  # a device's, wherever in loading or trying out it was met
        raise OutOfMemory(f"no room on the device for {spec.checkpoint.model_id} in {name}") from error
    except MemoryError as error:
        raise OutOfMemory(
            f"no room for {spec.checkpoint.model_id} in {name}; "
            "a smaller MAX_TOTAL_TOKENS makes its cache smaller"
        ) from error
    except Exception as error:  # what no check of the checkpoint foresaw
        _log.debug("loading %s", name, exc_info=error)
        said = in_short(error)
        raise CheckpointError(f"{spec.checkpoint.model_id} can't be served in {name} ({said})") from error
    model.load_seconds = time.perf_counter() - started
    return model
