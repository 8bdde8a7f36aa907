"""Errors of loading.

LoaderError
├── ModelNotFound         no such folder or hub id, or the hub can't be reached
├── CheckpointError       found, but unusable: truncated, pickle-only, not a causal LM
├── UnknownPrecision      not in the registry
├── PrecisionUnavailable  in the registry, but this host can't run it, or it can't be made of the checkpoint
└── OutOfMemory           the device has no room for it
"""

import re
from collections.abc import Sequence
from typing import Any

from loaders.base import Availability

_PATH = re.compile(r"(?<!\w)/[^\s'\"`,;:)]+")


class LoaderError(Exception):
    """A model could not be loaded; the message can be shown to a user."""


class ModelNotFound(LoaderError):
    pass


class CheckpointError(LoaderError):
    pass


class UnknownPrecision(LoaderError, ValueError):
    """A ``ValueError`` as well, so that ``canonical`` is a validator for pydantic."""

    def __init__(self, name: object, choices: Sequence[str]) -> None:
        self.choices = list(choices)
        shown = name if isinstance(name, str) and len(name) <= 40 else "that"
        self._arguments = name, choices
        super().__init__(f"unknown precision {shown!r}; choose from {', '.join(self.choices)}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments


class PrecisionUnavailable(LoaderError):
    def __init__(self, precision: str, availability: "Availability") -> None:
        self.precision, self.availability = precision, availability
        mend = f" (mend it with: {availability.install})" if availability.install else ""
        super().__init__(f"{precision} can't be served here: {availability.reason}{mend}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.precision, self.availability)


class OutOfMemory(LoaderError):
    pass


def in_short(error: BaseException) -> str:
    """A library's error as one line without paths, which can be shown to a client."""
    if isinstance(error, OSError):
        return type(error).__name__
    return f"{type(error).__name__}: {without_paths(str(error))}".rstrip(": ")


def without_paths(message: str) -> str:
    """A message as one line of at most 200 characters, which can be shown to a client."""
    return _PATH.sub("…", " ".join(message.split()))[:200]
