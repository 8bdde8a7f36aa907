"""Capturing GPU work once and replaying it: one launch in place of hundreds.

``Graphs`` is the seam. What is replayed reads and writes the tensors that it was captured with, whatever has
become of the names that they had; so everything that changes from step to step lies in tensors made once.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, Protocol

import torch

Replay = Callable[[], None]
_WARM_UPS = 2  # runs before a capture: libraries choose kernels and take workspaces then
_ONE_AT_A_TIME = threading.Lock()  # a process captures one graph at a time; engines have a thread each
_NO_POOL = (0, 0)
_streams: dict[int, Any] = {}


def release_unused() -> None:
    """Waits for what this thread has launched, and gives memory that nobody uses back to the driver.

    Never while a thread captures. For the same reason it waits for its stream: waiting for the whole device
    would break a capture on any of its streams.

    Raises: what the device has to say of work that failed.
    """
    with _ONE_AT_A_TIME:
        torch.cuda.current_stream().synchronize()
        torch.cuda.empty_cache()


def forget(replays: MutableMapping[Any, Replay]) -> None:
    """Lets graphs go, never while a thread captures.

    torch's generator keeps a list of the graphs that there are, and a capture adds to it without a lock and
    without the interpreter's.
    """
    with _ONE_AT_A_TIME:
        replays.clear()


def _stream_of(device: torch.device) -> Any:
    """All captures of a device are on one: cuBLAS keeps a workspace for each stream that it has ever met."""
    index = device.index or 0
    with _ONE_AT_A_TIME:
        if index not in _streams:
            _streams[index] = torch.cuda.Stream(device)
        return _streams[index]


class Graphs(Protocol):
    """What captures work of one thread."""

    def capture(self, work: Callable[[], object]) -> Replay:
        """Runs ``work`` a few times, records it, and returns what repeats it on the same tensors.

        Raises: whatever it is that can't be captured raises; nothing of it is left behind.
        """
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that the graphs hold: what lies between input and output, and workspaces."""
        ...


class CudaGraphs:
    """CUDA graphs of one engine: all share one memory pool, for no two of them run at a time.

    Args:
        device: whose work is captured.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _stream_of(device)
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._there_before: int | None = None

    def capture(self, work: Callable[[], object]) -> Replay:
        with _ONE_AT_A_TIME, torch.cuda.device(self._device):
            if self._there_before is None:
                self._there_before = self._taken(_NO_POOL)
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
        """The pool, and the libraries' workspaces that came with the captures; those outlive it."""
        return self._taken(tuple(self._pool)) + self._taken(_NO_POOL) - (self._there_before or 0)

    def _taken(self, pool: tuple[int, ...]) -> int:
        """Bytes that the allocator holds for the captures' stream in a pool."""
        return sum(
            int(segment["total_size"])
            for segment in torch.cuda.memory_snapshot()
            if segment["stream"] == self._stream.cuda_stream and tuple(segment["segment_pool_id"]) == pool
        )

    def _warm_up(self, work: Callable[[], object]) -> None:
        """On the stream of the capture: cuBLAS keeps a workspace for each stream."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(self._stream)

    @contextlib.contextmanager
    def _recovering(self) -> Iterator[list[BaseException]]:
        """After a capture that failed: the thread's own stream, allocator and generator as before it.

        ``torch.cuda.graph`` does none of it where ending the capture raises, as it does after most faults.
        What it raises then takes the place of the fault, which is therefore to be put into the list.
        """
        before = torch.cuda.current_stream()
        faults: list[BaseException] = []
        try:
            yield faults
        except BaseException:
            torch.cuda.set_stream(before)
            with contextlib.suppress(Exception):
                self._let_go()
            with contextlib.suppress(Exception):
                _out_of_capture(self._device.index or 0)
            if not faults:
                raise
            raise faults.pop() from None  # in no list any more, with all the tensors of its traceback

    def _let_go(self) -> None:
        """Ends what the capture began: a graph that was never made keeps its share of the pool."""
        pool = self._device.index or 0, self._pool
        torch._C._cuda_endAllocateToPool(*pool)  # raises where the capture had ended after all
        torch._C._cuda_releasePool(*pool)


def _out_of_capture(device: int) -> None:
    """torch before 2.13 takes the generator for one in a capture until the next one succeeds, and refuses to
    draw from it; a copy of its state is in none."""
    generator = torch.cuda.default_generators[device]
    generator.graphsafe_set_state(generator.clone_state())
