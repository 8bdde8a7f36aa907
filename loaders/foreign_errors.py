"""Errors of libraries while a precision is loaded or made, as errors of loading."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from loaders.errors import CheckpointError, LoaderError, OutOfMemory, in_short
from loaders.kv_cache.block_pool import CacheTooSmall

_log = logging.getLogger(__name__)


@contextmanager
def as_loader_errors(precision: str, model: str) -> Iterator[None]:
    """Within this context every exception is raised as a ``LoaderError`` that names precision and model."""
    try:
        yield
    except LoaderError:
        raise
    except torch.OutOfMemoryError as error:  # raised by a device while loading or checking the runner
        raise OutOfMemory(f"no room on the device for {model} in {precision}") from error
    except CacheTooSmall as error:
        raise OutOfMemory(f"no room for {model} in {precision}: {error}") from error
    except MemoryError as error:
        raise OutOfMemory(
            f"no room for {model} in {precision}; a smaller MAX_TOTAL_TOKENS makes its cache smaller"
        ) from error
    except Exception as error:  # not foreseen by any check of the checkpoint
        _log.debug("loading %s", precision, exc_info=error)
        raise CheckpointError(f"{model} can't be served in {precision} ({in_short(error)})") from error
