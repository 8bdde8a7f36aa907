"""Captures GPU work as CUDA graphs and replays it: one launch instead of hundreds.

``Graphs`` is the interface that tests replace. A replay reads and writes the memory of the tensors that it
was captured with; so all that changes from step to step is in static tensors.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, Protocol

import torch

Replay = Callable[[], None]
_WARM_UPS = 2  # runs before a capture, in which libraries choose kernels and allocate workspaces
_ONE_AT_A_TIME = threading.Lock()  # a process captures one graph at a time; each engine has its own thread
_NO_POOL = (0, 0)
_streams: dict[int, Any] = {}


def release_unused() -> None:
    """Waits for the work launched by this thread, and returns the allocator's unused memory to the driver.

    Not while a thread captures. It synchronizes only its stream for the same reason: synchronizing the device
    would break a capture on any of its streams.

    Raises: the device's error, if earlier work failed.
    """
    with _ONE_AT_A_TIME:
        torch.cuda.current_stream().synchronize()
        torch.cuda.empty_cache()


def forget(replays: MutableMapping[Any, Replay]) -> None:
    """Frees graphs, not while a thread captures.

    torch's generator keeps a list of all graphs; a capture appends to it without a lock and without the
    GIL.
    """
    with _ONE_AT_A_TIME:
        replays.clear()


def _stream_of(device: torch.device) -> Any:
    """The one stream of all captures on a device: cuBLAS keeps a workspace for every stream it has seen."""
    index = device.index or 0
    with _ONE_AT_A_TIME:
        if index not in _streams:
            _streams[index] = torch.cuda.Stream(device)
        return _streams[index]


class Graphs(Protocol):
    """Captures the work of one thread."""

    def capture(self, work: Callable[[], object]) -> Replay:
        """Runs ``work`` a few times, captures it, and returns a function that replays it on the same tensors.

        Raises: the error of work that can't be captured; the thread's state is as before the call.
        """
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that the graphs hold: intermediate tensors and workspaces."""
        ...


class CudaGraphs:
    """CUDA graphs of one engine; they share one memory pool, since no two of them run at a time.

    Args:
        device: of the captured work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _stream_of(device)
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._bytes_before: int | None = None

    def capture(self, work: Callable[[], object]) -> Replay:
        with _ONE_AT_A_TIME, torch.cuda.device(self._device):
            if self._bytes_before is None:
                self._bytes_before = self._reserved(_NO_POOL)
            self._warm_up(work)
            graph = torch.cuda.CUDAGraph()
            # thread_local: other engines compute, and other precisions load, while this one captures
            mode = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
            with self._recovering() as faults, torch.cuda.graph(graph, **mode):
                try:
                    work()
                except BaseException as fault:
                    faults.append(fault)
                    raise
        return graph.replay

    @property
    def nbytes(self) -> int:
        """The pool, and the libraries' workspaces allocated by the captures; those are never freed."""
        return self._reserved(tuple(self._pool)) + self._reserved(_NO_POOL) - (self._bytes_before or 0)

    def _reserved(self, pool: tuple[int, ...]) -> int:
        """Bytes that the allocator has reserved for the capture stream in a pool."""
        return sum(
            int(segment["total_size"])
            for segment in torch.cuda.memory_snapshot()
            if segment["stream"] == self._stream.cuda_stream and tuple(segment["segment_pool_id"]) == pool
        )

    def _warm_up(self, work: Callable[[], object]) -> None:
        """Runs ``work`` on the capture stream, since cuBLAS keeps a workspace for each stream."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(self._stream)

    @contextlib.contextmanager
    def _recovering(self) -> Iterator[list[BaseException]]:
        """After a failed capture, restores the thread's stream, allocator and generator.

        ``torch.cuda.graph`` restores none of them if ending the capture raises, as it does after most
        faults. That error replaces the original, which the caller therefore appends to the yielded list.
        """
        before = torch.cuda.current_stream()
        faults: list[BaseException] = []
        try:
            yield faults
        except BaseException:
            torch.cuda.set_stream(before)
            with contextlib.suppress(Exception):
                self._release_pool()
            with contextlib.suppress(Exception):
                _reset_generator(self._device.index or 0)
            if not faults:
                raise
            raise faults.pop() from None  # popped, so that no list keeps the tensors of its traceback alive

    def _release_pool(self) -> None:
        """Ends the capture's allocations: a graph that was never instantiated keeps its part of the pool."""
        pool = self._device.index or 0, self._pool
        torch._C._cuda_endAllocateToPool(*pool)  # raises if the capture had already ended
        torch._C._cuda_releasePool(*pool)


def _reset_generator(device: int) -> None:
    """torch before 2.13 treats the generator as capturing until the next capture succeeds, and refuses to
    draw from it; a copy of its state is not capturing."""
    generator = torch.cuda.default_generators[device]
    generator.graphsafe_set_state(generator.clone_state())
