"""Tensors of the emulated card: their memory is the host's, their device is ``cuda``.

DLPack moves a tensor from one device to the other, because it accepts any claimed device without a check.
Nothing is copied: both tensors share the same memory.
"""

import ctypes
import os
import threading
from collections import Counter
from ctypes import POINTER, c_char_p, c_int, c_int64, c_uint8, c_uint16, c_uint64, c_void_p
from typing import Any

import torch
from torch import Tensor

_CPU, _CUDA = 1, 2  # dlpack.h, DLDeviceType
_BLOCK = 512  # bytes, to which torch's allocator rounds


class _Device(ctypes.Structure):
    _fields_ = (("type", c_int), ("index", c_int))


class _Type(ctypes.Structure):
    _fields_ = (("code", c_uint8), ("bits", c_uint8), ("lanes", c_uint16))


class _Layout(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("device", _Device),
        ("dimensions", c_int),
        ("type", _Type),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
        ("offset", c_uint64),
    )


class _Managed(ctypes.Structure):
    """dlpack.h, DLManagedTensor."""


_Managed._fields_ = (("layout", _Layout), ("context", c_void_p), ("deleter", c_void_p))
_CODES = {  # dlpack.h, DLDataTypeCode, and bits
    torch.int8: (0, 8),
    torch.int16: (0, 16),
    torch.int32: (0, 32),
    torch.int64: (0, 64),
    torch.uint8: (1, 8),
    torch.float16: (2, 16),
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.bfloat16: (4, 16),
    torch.bool: (6, 8),
}
Pool = tuple[tuple[int, int], int]
"""A graph pool and the stream of its captures."""
_new_capsule: Any = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = ctypes.py_object, [c_void_p, c_char_p, c_void_p]


class Ledger:
    """Bytes of the tensors on a card, by graph pool."""

    def __init__(self, total: int) -> None:
        self.total, self.loose, self.peak, self.refusals = total, 0, 0, 0
        self.pools: Counter[Pool] = Counter()
        self._local, self._lock = threading.local(), threading.Lock()

    @property
    def now(self) -> int:
        collect()
        return self.loose + self.pools.total()

    def into(self, pool: Pool | None) -> None:
        """Sets the pool of this thread's allocations."""
        self._local.pool = pool

    def take(self, size: int) -> Pool | None:
        """Raises: OutOfMemoryError, as torch does."""
        if self.now + size > self.total:
            self.refusals += 1
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.")
        pool: Pool | None = getattr(self._local, "pool", None)
        self.change(size, pool)
        return pool

    def change(self, size: int, pool: Pool | None) -> None:
        with self._lock:
            if pool is None:
                self.loose += size
            else:
                self.pools[pool] += size
        self.peak = max(self.peak, self.loose + self.pools.total())

    def reset_peak(self) -> None:
        self.peak = self.now


cards = [
    Ledger(int(os.environ.get("EMULATED_CARD_BYTES", 8 << 30)))
    for _ in range(int(os.environ.get("EMULATED_CARDS", 1)))
]
_held: dict[int, tuple[Any, ...]] = {}
_native: Any = None


def begin(native: Any) -> None:
    """Args: native: the compiled ``native.cpp``."""
    global _native
    _native = native
    _native.next_gone.restype = c_void_p


def collect() -> None:
    """Releases tensors without references."""
    while (address := _native.next_gone()) is not None:
        card, size, pool = _held.pop(address)[-1]
        if size:
            cards[card].change(-size, pool)


def on_card(tensor: Tensor, card: int, owned: bool) -> Tensor:
    """The card's view of a tensor of the host.

    Args:
        owned: the memory belongs to the card and is counted.
    """
    size = -(-tensor.untyped_storage().nbytes() // _BLOCK) * _BLOCK if owned else 0
    with torch.inference_mode(tensor.is_inference()):
        return _seen_from(tensor, _Device(_CUDA, card), (card, size, cards[card].take(size)))


def on_host(tensor: Tensor) -> Tensor:
    """The host's view of a tensor of a card."""
    with torch.inference_mode(tensor.is_inference()):
        return _seen_from(tensor, _Device(_CPU, 0), (0, 0, None))


def _seen_from(tensor: Tensor, device: _Device, counted: tuple[int, int, Pool | None]) -> Tensor:
    tensor = tensor.detach()
    managed, count = _Managed(), max(tensor.dim(), 1)
    shape, strides = (c_int64 * count)(*tensor.shape), (c_int64 * count)(*tensor.stride())
    type_ = _Type(*_CODES[tensor.dtype], 1)
    managed.layout = _Layout(tensor.data_ptr(), device, tensor.dim(), type_, shape, strides, 0)
    managed.deleter = ctypes.cast(_native.let_go, c_void_p)
    _held[ctypes.addressof(managed)] = managed, shape, strides, tensor, counted
    seen: Tensor = torch._C._from_dlpack(_new_capsule(ctypes.addressof(managed), b"dltensor", None))
    return seen
