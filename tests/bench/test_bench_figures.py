"""Figures from arrival times, by examples computed by hand."""

import math
from pathlib import Path

import pytest

import loaders
from loaders import kernels
from loaders.base import ModelSpec
from loaders.checkpoint import open_checkpoint
from server.bench.errors import BenchError
from server.bench.figures import Floor, Run, mean_context, percentile, spread, summarize
from server.bench.session import floor_bytes
from tests import checkpoints


def test_only_tokens_while_all_rows_decode_count() -> None:
    early, late = [1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0]
    run = Run([early, late], prefill_seconds=0.5)
    assert run.window == (2.0, 4.0)
    assert run.decode_rate == 2.0  # 3.0 and 4.0 of each row, in 2 seconds
    assert run.gaps == [1.0, 1.0, 1.0, 1.0]


def test_rows_that_never_decode_together_are_an_error_with_advice() -> None:
    with pytest.raises(BenchError, match="--tokens"):
        _ = Run([[1.0, 2.0], [3.0, 4.0]], prefill_seconds=1.0).decode_rate


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 1.0), (0.5, 5.0), (0.9, 9.0), (0.91, 10.0), (0.99, 10.0), (1.0, 10.0)]
)
def test_percentiles_are_values_that_occurred(share: float, expected: float) -> None:
    assert percentile([7.0, 3.0, 10.0, 1.0, 9.0, 5.0, 2.0, 8.0, 4.0, 6.0], share) == expected


def test_no_values_have_no_percentile() -> None:
    assert math.isnan(percentile([], 0.5))


def test_spread_is_relative_to_the_median() -> None:
    assert spread([90.0, 100.0, 130.0]) == pytest.approx(0.4)


def test_several_runs_are_summarized_by_their_medians() -> None:
    def run(first: float, step: float) -> Run:
        return Run([[first + step * i for i in range(5)]] * 2, prefill_seconds=first)

    figures = summarize([run(0.1, 0.01), run(0.2, 0.02), run(0.4, 0.04)], prompt=32)
    assert figures.decode_rates == pytest.approx([200, 100, 50])
    assert figures.decode_tokens_per_second == pytest.approx(100)
    assert figures.spread == pytest.approx(1.5)
    assert figures.prefill_tokens_per_second == pytest.approx(2 * 32 / 0.2)
    assert figures.ttft_ms == pytest.approx(200)
    assert figures.inter_token_p50_ms == pytest.approx(20)
    assert figures.inter_token_p99_ms == pytest.approx(40)


def test_the_floor_is_bytes_by_bandwidth() -> None:
    floor = Floor(weights_bytes=900, kv_bytes=100.0, bandwidth=10_000.0, rows=8)
    assert floor.step_seconds == pytest.approx(0.1)
    assert floor.tokens_per_second == pytest.approx(80)
    assert floor.share(20) == pytest.approx(0.25)


def test_the_mean_context_is_that_of_the_steps() -> None:
    prompt, tokens = 32, 48
    steps = [prompt + step for step in range(1, tokens)]  # keys that each decode step attends to
    assert mean_context(prompt, tokens) == sum(steps) / len(steps)


def test_a_step_reads_a_tied_head_but_no_lookup_embedding(tmp_path: Path) -> None:
    model = checkpoints.gpt2()
    wte = model.transformer.wte.weight.nbytes
    wpe = model.transformer.wpe.weight.nbytes
    spec = ModelSpec(open_checkpoint(str(checkpoints.save(model, tmp_path / "gpt2"))), slots=2)
    for precision, looked_up, cached in [
        ("fp32", wpe, 4),
        ("bf16", wpe // 2, 2),
        # on the kernels embeddings are looked up in the head
        ("dynamic-int8", wpe + (wte if kernels.get() is None else 0), 4 if kernels.get() is None else 2),
    ]:
        loaded = loaders.load(precision, spec)
        assert loaded.footprint.lookup_bytes == looked_up, precision
        weights, kv = floor_bytes(loaded, cached_tokens=10)
        assert weights == loaded.footprint.weights_bytes - looked_up
        assert kv == 10 * 2 * 2 * 64 * cached  # keys and values, two layers, 64 wide
        loaded.close()


def test_an_untied_embedding_is_only_looked_up(tmp_path: Path) -> None:
    model = checkpoints.llama()
    spec = ModelSpec(open_checkpoint(str(checkpoints.save(model, tmp_path / "llama"))), slots=1)
    loaded = loaders.load("fp32", spec)
    assert loaded.footprint.lookup_bytes == model.model.embed_tokens.weight.nbytes
    loaded.close()
