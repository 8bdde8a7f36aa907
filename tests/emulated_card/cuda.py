"""``torch.cuda`` of the emulated cards, whose streams execute immediately.

Captures record the operations with the memory that they touched and replay them on it; as on a card, a
replay runs no Python.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from tests.emulated_card import dispatch
from tests.emulated_card.memory import Ledger, cards

_NO_POOL = (0, 0)


class Stream:
    _made = 0

    def __init__(self, device: Any = None, *_: Any, **__: Any) -> None:
        self.device, self.cuda_stream = torch.device("cuda", 0), Stream._made
        Stream._made += 1

    def wait_stream(self, other: "Stream") -> None:
        pass

    def wait_event(self, event: "Event") -> None:
        pass

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        dispatch.wait("synchronize")


class Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        self._at: float | None = None

    def record(self, stream: Stream | None = None) -> None:
        self._at = time.perf_counter()

    def query(self) -> bool:
        return True

    def wait(self, stream: Stream | None = None) -> None:
        pass

    def synchronize(self) -> None:
        dispatch.wait("synchronize")

    def elapsed_time(self, end: "Event") -> float:
        assert self._at is not None
        assert end._at is not None
        return 1e3 * (end._at - self._at)


class Graph:
    def __init__(self, *_: Any, **__: Any) -> None:
        self._tape: dispatch.Tape | None = None

    def replay(self) -> None:
        assert self._tape is not None, "a graph that was never captured"
        dispatch.check_not_recording("replay")
        self._tape.repeat()


class graph:  # noqa: N801 (as torch has it)
    """The context of a capture."""

    def __init__(
        self,
        cuda_graph: Graph,
        pool: tuple[int, int] | None = None,
        stream: Stream | None = None,
        capture_error_mode: str = "global",
    ) -> None:
        self._graph, self._pool, self._stream = cuda_graph, pool or pool_handle(), stream or Stream()

    def __enter__(self) -> None:
        self._before = current()
        _local.stream = self._stream
        dispatch.record(dispatch.Tape())
        for card in cards:
            card.into((self._pool, self._stream.cuda_stream))

    def __exit__(self, kind: Any, *_: Any) -> None:
        tape = dispatch.recording()
        dispatch.record(None)
        for card in cards:
            card.into(None)
        if kind is not None:  # like torch: ending a broken capture raises and skips the rest
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self._graph._tape = tape
        _local.stream = self._before


class _Device:
    def __init__(self, device: Any = None) -> None:
        self._index = _index(device)

    def __enter__(self) -> None:
        self._before = dispatch.current_card()
        dispatch.set_card(self._index)

    def __exit__(self, *_: Any) -> None:
        dispatch.set_card(self._before)


def _index(device: Any) -> int:
    if isinstance(device, int):
        return device
    index = torch.device(device).index if device is not None else None
    return dispatch.current_card() if index is None else index


def _card(device: Any) -> Ledger:
    return cards[_index(device)]


_local = threading.local()
_DEFAULT = Stream()
_pools = iter(range(1, 1 << 30))


def current(device: Any = None) -> Stream:
    stream: Stream = getattr(_local, "stream", _DEFAULT)
    return stream


def _set_stream(stream: Stream) -> None:
    _local.stream = stream


@contextmanager
def _on(stream: Stream | None) -> Iterator[None]:
    before = current()
    _set_stream(stream or before)
    try:
        yield
    finally:
        _set_stream(before)


def pool_handle() -> tuple[int, int]:
    return 0, next(_pools)


def _snapshot(*_: Any, **__: Any) -> list[dict[str, Any]]:
    return [
        {"total_size": size, "stream": stream, "segment_pool_id": pool}
        for card in cards
        for (pool, stream), size in {(_NO_POOL, 0): card.loose, **card.pools}.items()
    ]


def _properties(device: Any = None) -> Any:
    return SimpleNamespace(
        name="an emulated card", total_memory=_card(device).total, multi_processor_count=1, major=9, minor=0
    )


_GENERATOR = SimpleNamespace(clone_state=lambda: None, graphsafe_set_state=lambda state: None)


def _nothing(*_: Any, **__: Any) -> None:
    pass


STAND_INS: dict[str, Any] = {
    "_lazy_init": _nothing,
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "device_count": lambda: len(cards),
    "current_device": dispatch.current_card,
    "set_device": lambda device: dispatch.set_card(_index(device)),
    "device": _Device,
    "get_device_name": lambda device=None: _properties().name,
    "get_device_properties": _properties,
    "get_device_capability": lambda device=None: (9, 0),
    "is_bf16_supported": lambda including_emulation=True: True,
    "default_generators": (SimpleNamespace(clone_state=lambda: None, graphsafe_set_state=_nothing),)
    * len(cards),
    "synchronize": lambda device=None: dispatch.wait("synchronize"),
    "Stream": Stream,
    "Event": Event,
    "current_stream": current,
    "default_stream": lambda device=None: _DEFAULT,
    "set_stream": _set_stream,
    "stream": _on,
    "CUDAGraph": Graph,
    "graph": graph,
    "graph_pool_handle": pool_handle,
    "is_current_stream_capturing": lambda: dispatch.recording() is not None,
    "mem_get_info": lambda device=None: (_card(device).total - _card(device).now, _card(device).total),
    "memory_allocated": lambda device=None: _card(device).now,
    "memory_reserved": lambda device=None: _card(device).now,
    "max_memory_allocated": lambda device=None: _card(device).peak,
    "max_memory_reserved": lambda device=None: _card(device).peak,
    "reset_peak_memory_stats": lambda device=None: _card(device).reset_peak(),
    "memory_snapshot": _snapshot,
    "memory_stats": lambda device=None: {"num_ooms": _card(device).refusals},
    "empty_cache": _nothing,
    "ipc_collect": _nothing,
    "manual_seed": _nothing,
    "manual_seed_all": _nothing,
}


def begin() -> None:
    """Installs the replacements in ``torch.cuda``."""
    for name, what in STAND_INS.items():
        setattr(torch.cuda, name, what)
