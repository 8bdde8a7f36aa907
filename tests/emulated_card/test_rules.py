"""The emulated card has a card's rules. tests/test_emulated_card.py runs these tests on one."""

from collections.abc import Callable

import pytest
import torch

from tests.emulated_card import is_there
from tests.emulated_card.memory import cards

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not is_there(), reason="there is no emulated card")]


def captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    found = torch.cuda.CUDAGraph()
    with torch.cuda.graph(found):
        work()
    return found


def test_it_computes() -> None:
    ones = torch.ones(3, 4, device="cuda")
    layer = torch.nn.Linear(4, 2).to("cuda")
    expected = layer.weight.cpu().sum(1) + layer.bias.cpu()
    assert ones.is_cuda
    assert layer(ones).device == torch.device("cuda", 0)
    torch.testing.assert_close(layer(ones)[0].cpu(), expected)


def test_host_and_card_do_not_mix() -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, device="cuda") + torch.ones(2)
    assert (torch.ones(2, device="cuda") + torch.tensor(1.0)).tolist() == [2, 2]


def test_a_view_is_the_same_memory() -> None:
    whole = torch.zeros(2, 3, device="cuda")
    whole[1, 1:].fill_(5)
    assert whole.tolist() == [[0, 0, 0], [0, 5, 5]]


def test_a_replay_recomputes_on_the_same_tensors() -> None:
    given, result = torch.ones(2, device="cuda"), torch.zeros(2, device="cuda")
    graph = captured(lambda: result.copy_((given * 3).exp().log()))
    given.fill_(2)
    graph.replay()
    torch.testing.assert_close(result.cpu(), torch.tensor([6.0, 6.0]))


@pytest.mark.parametrize("waits", ["item", "copy to", "copy from", "boolean index", "synchronize"])
def test_a_capture_refuses_synchronization(waits: str) -> None:
    on_card, on_host = torch.ones(2, device="cuda"), torch.ones(2)
    work = {
        "item": lambda: on_card[0].item(),
        "copy to": lambda: on_card.copy_(on_host),
        "copy from": lambda: on_host.copy_(on_card),
        "boolean index": lambda: on_card[on_card > 0],
        "synchronize": torch.cuda.current_stream().synchronize,
    }[waits]
    work()
    with pytest.raises(RuntimeError, match="captur"):
        captured(work)
    assert on_card.tolist() == [1, 1]  # the capture has ended


def test_a_non_blocking_copy_arrives_with_the_synchronization() -> None:
    here = torch.zeros(2)
    here.copy_(torch.ones(2, device="cuda"), non_blocking=True)
    assert here.tolist() != [1, 1]
    torch.cuda.current_stream().synchronize()
    assert here.tolist() == [1, 1]


def test_memory_is_counted_and_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.cuda.memory_allocated()
    one = torch.zeros(1024, device="cuda")
    part = one[:10]
    assert torch.cuda.memory_allocated() - before == 4096
    del one
    assert torch.cuda.memory_allocated() - before == 4096
    del part
    assert torch.cuda.memory_allocated() == before
    monkeypatch.setattr(cards[0], "total", before + 4096)
    with pytest.raises(torch.OutOfMemoryError):
        torch.zeros(1025, device="cuda")
    assert torch.cuda.memory_allocated() == before
