"""Finding a precision's files, or making them: once, by one process, whole or not at all."""

import errno
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import loaders
from loaders.artifacts.cache import evict
from loaders.artifacts.in_use import hold, release
from loaders.artifacts.recipe import KEY, describe, describe_model, key_of
from loaders.base import ModelSpec, Progress, Recipe
from loaders.errors import CheckpointError, LoaderError
from loaders.locking import locked
from loaders.manifest import ManifestError, read_manifest, verify, write_manifest

Make = Callable[[Path, Progress], None]
"""Writes a precision's files into an empty folder."""

_FULL = {errno.ENOSPC, errno.EDQUOT}
_log = logging.getLogger(__name__)


class NotPrepared(LoaderError):
    """A precision's files take long to make, and were not made yet."""


class NotKept(LoaderError):
    """A precision's files can't be written."""


def prepare(spec: ModelSpec, recipe: Recipe, make: Make | None, progress: Progress) -> Path:
    """The folder with a precision's files: a saved checkpoint's own, the cached ones, or new ones.

    Cached files that are damaged are made again. While another process makes the same files, this one waits.
    They stay until this process ends, even if the cache then exceeds ``spec.artifacts_limit``.

    Args:
        make: writes the files; None if that takes so long that a person must start it. Files of the same
            method and model with other options, such as more steps of training, are then accepted.

    Raises:
        NotPrepared: there are none, and ``make`` is None.
        NotKept: the cache can't be written.
        CheckpointError: the files of a saved checkpoint are damaged.
        CalibrationError
    """
    if spec.checkpoint.saved is not None:
        return _saved(spec, recipe.method)
    folder = place_of(spec, recipe)
    if make is None:
        for made in (folder, *_made_otherwise(folder, spec, recipe)):
            if _held(made):
                return made
        raise NotPrepared(_not_prepared(spec, recipe.method))
    with _locked(folder, progress):
        if not _held(folder):
            _build(folder, spec, recipe, make, progress)
            hold(folder)
    if spec.artifacts_limit is not None:
        evict(folder.parent, spec.artifacts_limit)
    return folder


def _held(folder: Path) -> bool:
    """Whether all files are as they were written; if so, this process keeps others from removing them."""
    if not folder.is_dir():
        return False
    hold(folder)
    if is_whole(folder):
        return True
    release(folder)
    return False


def is_made(precision: str, spec: ModelSpec) -> bool:
    """Whether the files of a prepared precision exist; they are not verified.

    Raises:
        CalibrationError: the calibration text can't be read.
    """
    made_by = loaders.maker(precision)
    assert made_by is not None, precision
    if spec.checkpoint.saved is not None:
        return True
    recipe = made_by.recipe(precision, spec)
    folder = place_of(spec, recipe)
    return folder.is_dir() or bool(_made_otherwise(folder, spec, recipe))


def place_of(spec: ModelSpec, recipe: Recipe) -> Path:
    """Where the files of a recipe are cached. Another text, option or version has another place.

    Raises:
        CalibrationError: the calibration text can't be read.
    """
    described = describe(recipe, spec)
    key = key_of(described, describe_model(spec.checkpoint))
    return (spec.artifacts or default_cache()) / f"{recipe.method}-{key}"


def default_cache() -> Path:
    """The user's cache folder for made files."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "bitdial" / "artifacts"


def _not_prepared(spec: ModelSpec, method: str) -> str:
    """The message that files have to be made first, and the command."""
    name = spec.checkpoint.model_id
    model = "" if name == "bundled" else f" --model {name}"
    return f"{method} of {name} has to be made first: bitdial quantize{model} --method {method}"


def _build(folder: Path, spec: ModelSpec, recipe: Recipe, make: Make, progress: Progress) -> None:
    """Makes the files in a temporary folder beside ``folder``, then renames it.

    Raises:
        NotKept
    """
    partial = folder.with_name(f"{folder.name}.partial")
    started = time.monotonic()
    try:
        _remove(partial)  # of a process that was killed: the caller has the lock
        partial.mkdir(parents=True)
        make(partial, progress)
        seconds = time.monotonic() - started
        write_manifest(
            partial, recipe.method, describe(recipe, spec), describe_model(spec.checkpoint), seconds
        )
        _remove(folder)
        partial.rename(folder)
    except OSError as error:
        raise _not_kept(folder, error) from error
    finally:
        _remove(partial)


def _not_kept(folder: Path, error: OSError) -> NotKept:
    why = "the disk is full" if error.errno in _FULL else error.strerror or type(error).__name__
    return NotKept(f"{folder.name} can't be kept: {why}; --artifacts (or ARTIFACTS) names another folder")


def _saved(spec: ModelSpec, method: str) -> Path:
    checkpoint = spec.checkpoint
    if checkpoint.saved != method:
        raise CheckpointError(
            f"{checkpoint.model_id} is saved in {checkpoint.saved}; "
            f"for {method} name the model it was made from"
        )
    try:
        verify(checkpoint.folder, read_manifest(checkpoint.folder))
    except ManifestError as error:
        raise CheckpointError(f"{checkpoint.model_id}: {error}") from error
    return checkpoint.folder


def _made_otherwise(folder: Path, spec: ModelSpec, recipe: Recipe) -> list[Path]:
    """The folders of a method and a model with other options but of the same format, the newest first."""
    model, form = describe_model(spec.checkpoint)["files"], recipe.options.get("format")
    found: list[tuple[str, Path]] = []
    for other in folder.parent.glob(f"{recipe.method}-{'[0-9a-f]' * KEY}"):
        with suppress(ManifestError):
            made = read_manifest(other)
            options = made.recipe.get("options", {})
            if made.model.get("files") == model and options.get("format") == form:
                found.append((made.made, other))
    return [path for _, path in sorted(found, reverse=True)]


def is_whole(folder: Path) -> bool:
    """Whether all files are as they were written."""
    if not folder.is_dir():
        return False
    try:
        verify(folder, read_manifest(folder))
    except ManifestError as error:
        _log.warning("cached files of %s are not used: %s", folder.name, error)
        return False
    return True


@contextmanager
def _locked(folder: Path, progress: Progress) -> Iterator[None]:
    """As ``locked``.

    Raises:
        NotKept
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder, progress))
        except OSError as error:
            raise _not_kept(folder, error) from error
        yield


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
