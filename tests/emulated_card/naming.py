"""Features that torch supports only with CUDA: pinned memory, and a number as a device.

Pinning is ignored, since it has no allocator here. accelerate's device maps consist of numbers.
"""

from typing import Any

import torch
from torch.utils._device import _device_constructors

from tests.emulated_card.memory import cards


class _Named(type):
    """``torch.device`` that accepts a number, which torch without a card does not."""

    def __instancecheck__(cls, what: Any) -> bool:
        return isinstance(what, _TrueDevice)

    def __call__(cls, what: Any, *index: int) -> Any:
        return _TrueDevice(_name_of(what), *index)


class _AnyDevice(metaclass=_Named):
    """Replaces ``torch.device``; its instances are real devices."""


_TrueDevice = torch.device
_MADE = ("tensor", "empty", "empty_like", "zeros", "zeros_like", "ones", "full", "arange")
_MAKERS: list[tuple[Any, str]] = [(torch, name) for name in _MADE]
_MOVERS: list[tuple[Any, str]] = [(torch.Tensor, "to"), (torch.nn.Module, "to"), (torch._C._nn, "_parse_to")]


def _name_of(device: Any) -> Any:
    return f"cuda:{device}" if type(device) is int else device


def begin() -> None:
    _device_constructors()  # fills torch's cache: torch.device("meta") needs the original constructors
    for owner, name in _MAKERS + _MOVERS:
        setattr(owner, name, _understanding(getattr(owner, name), moves=(owner, name) in _MOVERS))
    if len(cards) > 1:
        torch.device = _AnyDevice  # type: ignore[misc, assignment]


def _understanding(call: Any, moves: bool) -> Any:
    def called(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _name_of(kwargs["device"])
        if moves:
            args = tuple(map(_name_of, args))
        return call(*args, **kwargs)

    return called
