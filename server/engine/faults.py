"""Errors of a computation: which ServiceError the sequence ends with, and whether the device still works."""

from collections.abc import Callable
from typing import TypeVar

import torch

from loaders.cuda.cuda_graphs import release_unused
from server.errors import GenerationFailed, ServiceError

_T = TypeVar("_T")


class BadLogits(ArithmeticError):
    """The model gave no usable distribution for this row (NaN, or nothing finite)."""


class DeviceLost(BaseException):
    """The accelerator fails every call from now on, as after an illegal access: only a new process helps.

    No request causes it: as a ``BaseException`` it passes code that isolates single requests.
    """


def run_isolated(call: Callable[[], _T]) -> tuple[_T | None, ServiceError | None]:
    """The result, or the error. The exception and the tensors that its traceback held are freed on return.

    Raises:
        DeviceLost
    """
    try:
        return call(), None
    except Exception as error:
        service_error = as_service_error(error)
    _recover()
    return None, service_error


def as_service_error(error: Exception) -> ServiceError:
    """The error that the request's client receives, without the exception's own text."""
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, BadLogits):
        return GenerationFailed(str(error))
    if _is_out_of_memory(error):
        return GenerationFailed("out of memory while generating; ask for fewer tokens or try again")
    return GenerationFailed(f"the model failed on this request ({type(error).__name__})")


def _recover() -> None:
    """Frees the device memory that the failed call held.

    Raises:
        DeviceLost: the device fails this call, too.
    """
    if not torch.cuda.is_initialized():
        return
    try:
        release_unused()
    except Exception as error:
        raise DeviceLost("the device no longer works") from error


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and any(phrase in text for phrase in ("allocate memory", "not enough memory", "out of memory"))
    )
