"""Memory for weights: the same values, contiguous, freed with the last tensor."""

import gc
import mmap
import weakref

import pytest
import torch
from torch import Tensor, nn

from loaders.layers.huge_pages import Arena

SOME = [
    torch.arange(7, dtype=torch.float32),
    torch.arange(12, dtype=torch.int8).view(3, 4),
    torch.ones(5, 3, dtype=torch.bfloat16).t(),  # not contiguous
    torch.empty(0, 4, dtype=torch.float32),
    torch.full((2, 2), 9, dtype=torch.uint8),
]


def test_values_shapes_and_types_are_kept() -> None:
    arena = Arena()
    for tensor in SOME:
        placed = arena.place(tensor)
        assert torch.equal(placed, tensor)
        assert (placed.dtype, placed.shape) == (tensor.dtype, tensor.shape)
        assert placed.is_contiguous()


def test_what_is_placed_is_a_copy() -> None:
    tensor = torch.zeros(8, dtype=torch.float32)
    placed = Arena().place(tensor)
    tensor.fill_(1)
    assert not placed.any()


def test_neighbours_share_no_cache_line() -> None:
    arena = Arena()
    placed = [arena.place(tensor) for tensor in SOME if tensor.numel()]
    starts = [tensor.data_ptr() for tensor in placed]
    assert starts == sorted(starts)
    assert all(start % 64 == 0 for start in starts)
    ends = [tensor.data_ptr() + tensor.nbytes for tensor in placed]
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))


def test_a_matrix_larger_than_a_chunk_begins_a_page() -> None:
    arena = Arena()
    arena.place(SOME[0])
    large = torch.arange(9 << 20, dtype=torch.int32)
    placed = arena.place(large)
    assert torch.equal(placed, large)
    assert placed.data_ptr() % (2 << 20) == 0


def test_memory_is_freed_with_the_last_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    mapped: list[weakref.ref[mmap.mmap]] = []

    class Watched(mmap.mmap):
        pass

    def watch(*args: object, **options: object) -> mmap.mmap:
        memory = Watched(*args, **options)  # type: ignore[arg-type]
        mapped.append(weakref.ref(memory))
        return memory

    monkeypatch.setattr("loaders.layers.huge_pages.mmap.mmap", watch)
    arena = Arena()
    first, second = (arena.place(tensor) for tensor in SOME[:2])
    del arena, first
    gc.collect()
    assert alive(mapped) == 1
    assert int(second.sum()) == 66
    del second
    gc.collect()
    assert alive(mapped) == 0


def alive(references: "list[weakref.ref[mmap.mmap]]") -> int:
    return sum(reference() is not None for reference in references)


def test_all_tensors_are_moved_and_tied_weights_stay_tied() -> None:
    above, below = nn.Linear(4, 4), nn.Linear(4, 4)
    below.weight = above.weight
    model = nn.Sequential(above, below, nn.BatchNorm1d(4)).eval()
    x = torch.randn(3, 4)
    expected: Tensor = model(x)
    arena = Arena()
    below.weight.data = first = arena.place(below.weight.data)
    before = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    arena.move_remaining(model)
    assert torch.equal(model(x), expected)
    assert above.weight.data_ptr() == below.weight.data_ptr() == first.data_ptr()
    after = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    assert before & after == {first.data_ptr()}


def test_a_system_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("loaders.layers.huge_pages.mmap.MADV_HUGEPAGE", raising=False)
    placed: Tensor = Arena().place(SOME[0])
    assert torch.equal(placed, SOME[0])
