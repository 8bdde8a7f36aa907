"""The order of CUDA calls in a capture, recorded by a fake of ``torch.cfrom tests.conftest import PATIENCE
uda``."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loaders.cuda import cuda_graphs
from loaders.cuda.cuda_graphs import CudaGraphs, forget, release_unused
from tests.conftest import PATIENCE

DEVICE = torch.device("cuda", 0)


class FakeStream:
    def __init__(self, cuda: "Cuda", number: int) -> None:
        self._cuda, self.cuda_stream = cuda, number

    def wait_stream(self, other: "FakeStream") -> None:
        self._cuda.calls.append(f"{self.cuda_stream} waits for {other.cuda_stream}")

    def synchronize(self) -> None:
        self._cuda.calls.append(f"host waits for {self.cuda_stream}")


class FakeGenerator:
    def __init__(self, cuda: "Cuda") -> None:
        self._cuda = cuda

    def clone_state(self) -> str:
        return "a copy of its state"

    def graphsafe_set_state(self, state: str) -> None:
        self._cuda.calls.append(f"generator: {state}")


class Cuda:
    """The part of ``torch.cuda`` that captures call."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.segments: list[dict[str, Any]] = []
        self.broken = False
        self.default_generators = (FakeGenerator(self),)
        self._streams = [FakeStream(self, 0)]
        self._now = self._streams[0]

    def Stream(self, device: torch.device) -> FakeStream:  # noqa: N802 (as torch has it)
        self._streams.append(FakeStream(self, len(self._streams)))
        return self._streams[-1]

    def graph_pool_handle(self) -> tuple[int, int]:
        return (0, 5)

    def current_stream(self) -> FakeStream:
        return self._now

    def set_stream(self, stream: FakeStream) -> None:
        self._now = stream
        self.calls.append(f"back on {stream.cuda_stream}")

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self._now = self._now, stream
        yield
        self._now = before

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        yield

    def CUDAGraph(self) -> Any:  # noqa: N802
        return SimpleNamespace(replay=lambda: self.calls.append("replayed"))

    @contextmanager
    def graph(self, graph: Any, *, pool: Any, stream: FakeStream, capture_error_mode: str) -> Iterator[None]:
        """As in torch: if ending a capture raises, its stream stays the current one."""
        self.calls.append(f"captures on {stream.cuda_stream} into {pool}, {capture_error_mode}")
        before, self._now = self._now, stream
        try:
            yield
        finally:
            if self.broken:
                raise RuntimeError("the capture was invalidated")
            self._now = before

    def memory_snapshot(self) -> list[dict[str, Any]]:
        return self.segments

    def empty_cache(self) -> None:
        self.calls.append("gives back")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    made = Cuda()
    library = SimpleNamespace(
        _cuda_endAllocateToPool=lambda *ended: made.calls.append(f"lets go of {ended}"),
        _cuda_releasePool=lambda *ended: made.calls.append(f"gives back its share of {ended}"),
    )
    monkeypatch.setattr(cuda_graphs, "torch", SimpleNamespace(cuda=made, _C=library))
    monkeypatch.setattr(cuda_graphs, "_streams", {})
    return made


def test_work_is_warmed_up_on_the_stream_of_its_capture(cuda: Cuda) -> None:
    graphs = CudaGraphs(DEVICE)
    replay = graphs.capture(lambda: cuda.calls.append(f"works on {cuda.current_stream().cuda_stream}"))
    replay()
    assert cuda.calls == [
        "1 waits for 0",
        "works on 1",
        "works on 1",
        "0 waits for 1",
        "captures on 1 into (0, 5), thread_local",
        "works on 1",
        "replayed",
    ]
    assert cuda.current_stream().cuda_stream == 0


def test_a_broken_capture_leaves_stream_allocator_and_generator_as_they_were(cuda: Cuda) -> None:
    graphs, cuda.broken = CudaGraphs(DEVICE), True
    with pytest.raises(RuntimeError, match="invalidated"):
        graphs.capture(lambda: None)
    assert cuda.calls[-4:] == [
        "back on 0",
        "lets go of (0, (0, 5))",
        "gives back its share of (0, (0, 5))",
        "generator: a copy of its state",
    ]
    cuda.broken = False
    CudaGraphs(DEVICE).capture(lambda: None)  # the lock is free, too


@pytest.mark.parametrize("broken", [True, False])
def test_the_cause_of_a_broken_capture_is_raised_rather_than_the_failure_to_end_it(
    cuda: Cuda, broken: bool
) -> None:
    runs = []

    def work() -> None:
        runs.append(1)
        if len(runs) == 3:  # after the warm-ups
            raise ValueError("it waits for the host")

    cuda.broken = broken
    with pytest.raises(ValueError, match="waits for the host"):
        CudaGraphs(DEVICE).capture(work)
    assert cuda.current_stream().cuda_stream == 0


def test_graphs_are_not_freed_while_another_thread_captures(cuda: Cuda) -> None:
    capturing, finish = threading.Event(), threading.Event()

    def work() -> None:
        capturing.set()
        finish.wait(PATIENCE)

    replays: dict[Any, Any] = {"a step": lambda: None}
    thread = threading.Thread(target=lambda: CudaGraphs(DEVICE).capture(work))
    thread.start()
    capturing.wait(PATIENCE)
    other = threading.Thread(target=forget, args=(replays,))
    other.start()
    other.join(0.2)
    assert replays
    finish.set()
    for one in (thread, other):
        one.join(PATIENCE)
    assert not replays


def test_the_captures_of_all_engines_share_a_stream(cuda: Cuda) -> None:
    for _ in range(3):
        CudaGraphs(DEVICE).capture(lambda: None)
    assert {line for line in cuda.calls if line.startswith("captures")} == {
        "captures on 1 into (0, 5), thread_local"
    }


def test_bytes_of_the_pool_and_of_new_workspaces(cuda: Cuda) -> None:
    def segment(size: int, stream: int, pool: tuple[int, int] = (0, 0)) -> dict[str, Any]:
        return {"total_size": size, "stream": stream, "segment_pool_id": pool}

    cuda.segments = [segment(1, 0), segment(20, 1), segment(300, 1, (0, 4))]  # others', from before
    graphs = CudaGraphs(DEVICE)
    graphs.capture(lambda: None)
    assert graphs.nbytes == 0
    cuda.segments += [segment(4000, 1), segment(50000, 1, (0, 5)), segment(600000, 0)]
    assert graphs.nbytes == 54000


def test_memory_is_not_released_while_another_thread_captures(cuda: Cuda) -> None:
    """Nor does anything ever synchronize the whole device, which would break a capture."""
    capturing, finish = threading.Event(), threading.Event()

    def work() -> None:
        capturing.set()
        finish.wait(PATIENCE)

    thread = threading.Thread(target=lambda: CudaGraphs(DEVICE).capture(work))
    thread.start()
    capturing.wait(PATIENCE)
    other = threading.Thread(target=release_unused)
    other.start()
    other.join(0.2)
    assert "gives back" not in cuda.calls
    finish.set()
    for one in (thread, other):
        one.join(PATIENCE)
    assert cuda.calls[-2:] == ["host waits for 0", "gives back"]
