"""The registry of precisions: names → modules, each imported on first use.

A new precision is one module that implements ``Loader`` and one line in ``PRECISIONS``.
"""

import time
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from loaders import import_noise
from loaders.base import Availability, Checkpoint, LoadedModel, ModelSpec, Progress, Recipe, ignore_progress
from loaders.errors import LoaderError, PrecisionUnavailable, UnknownPrecision
from loaders.foreign_errors import as_loader_errors
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
    "direct",
    "load",
    "offered",
]

import_noise.silence()

PRECISIONS: dict[str, str] = {
    "fp32": "loaders.precisions.full",
    "bf16": "loaders.precisions.full",
    "fp16": "loaders.precisions.full",
    "int8": "loaders.precisions.bnb",
    "nf4": "loaders.precisions.bnb",
    "fp4": "loaders.precisions.bnb",
    "dynamic-int8": "loaders.precisions.dynamic_int8",
    "static-int8": "loaders.precisions.static_int8",
    "int4": "loaders.precisions.int4",
    "qat-int8": "loaders.precisions.qat",
    "qat-int4": "loaders.precisions.qat",
    "torchao-int8": "loaders.precisions.torchao",
    "torchao-int4": "loaders.precisions.torchao",
    "onnx-fp32": "loaders.precisions.onnx",
    "onnx-int8": "loaders.precisions.onnx",
    "onnx-static-int8": "loaders.precisions.onnx",
    "onnx-int4": "loaders.precisions.onnx",
    "litert-fp32": "loaders.precisions.litert",
    "litert-fp16": "loaders.precisions.litert",
    "litert-int8": "loaders.precisions.litert",
    "litert-full-int8": "loaders.precisions.litert",
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
    """The functions of a module in the registry.

    One that can save what it quantizes is a ``Maker`` as well.
    """

    def availability(self, precision: str, device: Literal["cpu", "cuda"]) -> Availability: ...

    def load(self, precision: str, spec: ModelSpec, progress: Progress) -> LoadedModel: ...

    def estimate_bytes(self, precision: str, spec: ModelSpec) -> int:
        """Weight bytes that the precision will need; used before loading, only to decide what fits."""
        ...


class Selective(Protocol):
    """What a ``Loader`` has that can't take every checkpoint."""

    def refusal(self, precision: str, spec: ModelSpec) -> str | None:
        """Why it can't take this one, from its configuration and shapes alone; None if it can.

        ``load`` and ``make`` are called only for those that it takes.
        """
        ...


class Maker(Protocol):
    """The functions of a module that makes files.

    Its ``load`` calls ``prepare`` with them, unless the module says ``PREPARED = False``: then it quantizes
    anew at every load, and files are made only to be saved.
    """

    def recipe(self, precision: str, spec: ModelSpec) -> Recipe: ...

    def make(self, precision: str, spec: ModelSpec, folder: Path, progress: Progress) -> None: ...


class Converter(Protocol):
    """What a ``Maker`` has that also makes files from a checkpoint that is saved in another precision."""

    SOURCES: tuple[str, ...]
    """These precisions."""

    def remark(self, precision: str, spec: ModelSpec) -> str | None:
        """What is lost by the conversion of this checkpoint; None if nothing is."""
        ...


def canonical(name: object) -> str:
    """The registry's name for a precision or alias.

    Raises:
        UnknownPrecision: the name is neither; the error lists the choices.
    """
    if isinstance(name, str) and (known := ALIASES.get(name, name)) in PRECISIONS:
        return known
    raise UnknownPrecision(name, list(PRECISIONS))


def aliases(precision: str) -> list[str]:
    return [alias for alias, name in ALIASES.items() if name == precision]


def loader(precision: str) -> Loader:
    return cast(Loader, cast(Any, import_module(PRECISIONS[canonical(precision)])))


def maker(precision: str) -> Maker | None:
    """The functions by which the precision's files are made; None if it has no files of its own."""
    module = cast(Any, loader(precision))
    return cast(Maker, module) if hasattr(module, "make") else None


def converter(precision: str, saved: str) -> Converter | None:
    """By which the precision is made from a checkpoint that is saved in another; None if it can't be."""
    module = cast(Any, loader(precision))
    return cast(Converter, module) if saved in getattr(module, "SOURCES", ()) else None


def availability(precision: str, device: Literal["cpu", "cuda"]) -> Availability:
    """Whether this host can run ``precision`` on ``device``."""
    return loader(precision).availability(canonical(precision), device)


def available(device: Literal["cpu", "cuda"]) -> tuple[str, ...]:
    """The precisions that this host can run on ``device``, in the registry's order."""
    return tuple(name for name in PRECISIONS if availability(name, device).ok)


def is_prepared(precision: str) -> bool:
    """Whether the precision loads files that are made from the checkpoint once, and kept."""
    return maker(precision) is not None and getattr(loader(precision), "PREPARED", True)


def direct(device: Literal["cpu", "cuda"]) -> tuple[str, ...]:
    """The precisions that this host can run and that are quantized while they are loaded."""
    return tuple(name for name in available(device) if not is_prepared(name))


def suitability(precision: str, spec: ModelSpec) -> Availability:
    """As ``availability``, for one checkpoint: whether the precision can be made of its layers."""
    name = canonical(precision)
    able, module = availability(name, spec.device), cast(Any, loader(name))
    if not able.ok or not hasattr(module, "refusal"):
        return able
    return Availability(cast(Selective, module).refusal(name, spec))


def offered(precision: str, spec: ModelSpec) -> Availability:
    """As ``suitability``; a checkpoint that is quantized already has a single precision."""
    name, checkpoint = canonical(precision), spec.checkpoint
    if checkpoint.saved not in (None, name):
        return Availability(
            f"{checkpoint.model_id} is saved in {checkpoint.saved}; "
            "for other precisions name the model that it was made from"
        )
    return suitability(name, spec)


def load(precision: str, model: ModelSpec | str | Path, progress: Progress = ignore_progress) -> LoadedModel:
    """Loads a model in one precision and returns it with the time that loading took.

    Args:
        precision: a name of ``PRECISIONS`` or an alias of one.
        model: a checkpoint with options; or ``bundled``, a folder or a hub id, with the default options for
            one sequence, on a GPU if there is one.
        progress: called with (stage, current, total).

    Raises:
        UnknownPrecision, PrecisionUnavailable, ModelNotFound, CheckpointError, OutOfMemory
    """
    name = canonical(precision)
    spec = model if isinstance(model, ModelSpec) else _spec_of(model, progress)
    loaded = _load(name, spec, progress)
    loaded.spec = spec
    return loaded


def _spec_of(model: str | Path, progress: Progress) -> ModelSpec:
    spec: ModelSpec = cast(Any, import_module("loaders.interactive.text")).spec_of(model, progress)
    return spec


def _load(name: str, spec: ModelSpec, progress: Progress) -> LoadedModel:
    able = offered(name, spec)
    if not able.ok:
        raise PrecisionUnavailable(name, able)
    started = time.perf_counter()
    with as_loader_errors(name, spec.checkpoint.model_id), large_blocks_returned():
        model = loader(name).load(name, spec, progress)
    model.load_seconds = time.perf_counter() - started
    return model
