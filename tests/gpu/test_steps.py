"""Replayed steps: captured in every precision, equal to launched ones bit for bit, rows independent."""

from typing import Any

import pytest
import torch
from torch import Tensor

from loaders.cuda.cuda_graphs import CudaGraphs, release_unused
from loaders.cuda.forward import LeanGPT2
from loaders.cuda.graph_runner import GraphRunner
from tests.gpu.conftest import PRECISIONS, Load

pytestmark = pytest.mark.gpu
FAMILIES = ("gpt2", "llama")
STEPS = 5


def run(runner: GraphRunner, work: dict[int, list[int]], watched: int) -> list[Tensor]:
    """The logits of the watched slot after its prompt and after each of a few steps of all slots."""
    found = []
    for slot, prompt in work.items():
        logits = runner.prefill(slot, prompt)
        assert logits is not None
        if slot == watched:
            found.append(logits.clone())
    slots = list(work)
    for step in range(STEPS):
        logits = runner.decode(slots, [40 + step] * len(slots))
        found.append(logits[slots.index(watched)][None].clone())
    for slot in slots:
        runner.free(slot)
    return found


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def work_for(slots: int) -> dict[int, list[int]]:
    """Prompts of 3 … 63 tokens and, in every fifth slot, of 200."""
    lengths = [200 if slot % 5 == 4 else 3 + 4 * slot for slot in range(slots)]
    return {slot: [(7 * i + slot) % 300 + 5 for i in range(n)] for slot, n in enumerate(lengths)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_replayed_steps_equal_launched_ones_bit_for_bit(load: Load, precision: str, family: str) -> None:
    captured, launched = load(precision, family), load(precision, family, cuda_graphs=False)
    work = work_for(16)
    assert same(run(captured, work, 5), run(launched, work, 5))
    assert captured.report()["not_captured_because"] is None
    assert captured.captured
    assert not launched.captured


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_is_the_same_alone_and_among_fifteen(load: Load, precision: str, family: str) -> None:
    runner, work = load(precision, family), work_for(16)
    for watched in (0, 7, 15):
        others = {slot: prompt for slot, prompt in work.items() if slot != watched}
        alone = run(runner, {watched: work[watched]}, watched)
        assert same(run(runner, {**others, watched: work[watched]}, watched), alone), watched


@pytest.mark.parametrize("precision", PRECISIONS)
def test_prefill_chunks_do_not_change_the_logits(load: Load, precision: str) -> None:
    runner, prompt = load(precision), work_for(16)[4]
    whole = runner.prefill(0, prompt)
    for start, end in ((0, 33), (33, 90), (90, 200)):
        cut = runner.prefill(1, prompt[start:end])
        if end == 33:
            cut = None
    assert whole is not None
    found = runner.decode([0, 1], [9, 9])
    assert torch.equal(found[0], found[1])
    assert cut is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_logits_are_those_of_the_model_itself(load: Load, family: str) -> None:
    runner = load("fp32", family)
    prompt = work_for(16)[4]
    logits = runner.prefill(2, prompt, "all")
    torch.testing.assert_close(logits, runner.score(prompt), atol=1e-3, rtol=1e-3)
    found = runner.decode([2], [17])
    torch.testing.assert_close(found[0], runner.score([*prompt, 17])[-1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("precision", ["nf4", "fp4"])
def test_double_quantization_is_captured(load: Load, precision: str) -> None:
    runner = load(precision, double_quantization=True)
    runner.prefill(0, [5, 6, 7])
    assert runner.captured, runner.report()


def test_an_outlier_threshold_runs_uncaptured_and_reports_why(load: Load) -> None:
    runner = load("int8", int8_threshold=6.0)
    logits = runner.prefill(0, [5, 6, 7])
    assert logits is not None
    assert torch.isfinite(logits).all()
    assert not runner.captured
    assert "waits for the host" in runner.report()["not_captured_because"]


@pytest.mark.parametrize("steady", [True, False])
def test_fitted_and_full_step_sizes_agree(load: Load, steady: bool) -> None:
    runner = load("fp32", batch_invariant=steady)
    for slots in (1, 3, 16):
        work = {slot: prompt for slot, prompt in work_for(16).items() if slot < slots}
        expected = [runner.score([*work[0], *range(40, 41 + step)])[-1] for step in range(STEPS)]
        for row, found in zip(expected, run(runner, work, 0)[1:], strict=True):
            torch.testing.assert_close(found[0], row, atol=1e-3, rtol=1e-3)


def test_a_failed_capture_falls_back_and_the_next_load_captures(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream, the allocator and the libraries recover from the broken capture."""
    think = LeanGPT2._mlp

    def waits(self: LeanGPT2, layer: Any, hidden: Tensor) -> Tensor:
        return think(self, layer, hidden) + 0.0 * float(hidden.sum())

    good = load("fp32")
    expected = run(good, work_for(16), 5)
    with monkeypatch.context() as patched:
        patched.setattr(LeanGPT2, "_mlp", waits)
        broken = load("fp32")
        found = run(broken, work_for(16), 5)
    assert not broken.captured
    assert broken.report()["not_captured_because"]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    again = load("fp32")
    assert same(run(again, work_for(16), 5), expected)
    assert again.captured, again.report()
    assert same(run(good, work_for(16), 5), expected)


def test_reported_bytes_equal_allocated_ones_and_closing_frees_them(load: Load) -> None:
    load("fp32").prefill(0, [1])  # allocations that are made once
    release_unused()
    before = torch.cuda.memory_reserved()
    runner = load("fp32")
    runner.prefill(0, [5, 6, 7])
    release_unused()
    weights = sum(parameter.nbytes for parameter in runner.module.parameters())
    reported = weights + runner.kv_cache_bytes + runner.working_bytes
    assert isinstance(runner._graphs._graphs, CudaGraphs)
    assert abs(reported - (torch.cuda.memory_reserved() - before)) < 32 * 2**20
    runner.close()
    release_unused()
    assert torch.cuda.memory_reserved() - before < 80 * 2**20  # a thread's workspaces stay
