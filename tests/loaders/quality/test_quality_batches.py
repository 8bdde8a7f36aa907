"""Windows computed in batches or in chunks: the same figures within the allowed memory."""

import weakref
from collections.abc import Sequence
from dataclasses import asdict, replace
from io import BytesIO
from typing import Any

import pytest
import torch
from torch import Tensor

import loaders
from loaders.base import LoadedModel, ModelSpec
from loaders.checkpoint import load_tokenizer
from loaders.quality import measure, passes
from loaders.quality.passes import Passes
from loaders.runners.decoder_cpu_runner import DecoderCPURunner
from loaders.texts.text import Text, Window, batches, windows
from tests.fakes import FakeDeviceRunner, FakeRunner, fake_model

WORDS = "the naïve café – in an other theatre, 東京 and then there …\n    indented, and again\n" * 24


@pytest.fixture(scope="module")
def models(small_spec: ModelSpec) -> list[LoadedModel]:
    return [loaders.load(name, small_spec) for name in ("fp32", "nf4", "dynamic-int8")]


def text(content: str) -> Text:
    data = content.encode()
    return Text("words", len(data), lambda: BytesIO(data))


def figures(models: list[LoadedModel], small_spec: ModelSpec, **how: Any) -> list[dict[str, Any]]:
    tokenizer = load_tokenizer(small_spec.checkpoint)
    found = measure(models[0], models, text(WORDS[:1100]), tokenizer, prompts=0, **how)
    kept = [asdict(one) for one in found]
    for one in kept:
        del one["seconds"], one["reference_seconds"], one["greedy"]
    return kept


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]], exactly: bool) -> None:
    for one, other in zip(found, expected, strict=True):
        for name, value in expected[0].items():
            if name in ("batch", "precision") or exactly or not isinstance(value, float):
                continue
            # median and 99th percentile lie in bins of half a per cent, whose bounds rounding may cross
            near = 0.006 if name in ("median_kl", "p99_kl") else 1e-3 if "kl" in name else 1e-5
            assert one[name] == pytest.approx(other[name], rel=near, abs=1e-12), name
        if exactly:
            assert one | {"batch": 0} == other | {"batch": 0}


@pytest.mark.parametrize(("window", "stride"), [(64, 24), (48, 48)])
def test_together_the_figures_are_those_of_each_window_alone(
    models: list[LoadedModel], small_spec: ModelSpec, window: int, stride: int
) -> None:
    alone = figures(models, small_spec, window=window, stride=stride, batch=1)
    for batch in (2, 7, None):
        together = figures(models, small_spec, window=window, stride=stride, batch=batch)
        assert together[0]["batch"] == (batch or passes.PAYS // window)
        # the compiled kernels compute each row by itself
        assert_same(together, alone, exactly=isinstance(models[0].runner, DecoderCPURunner))


def test_a_window_with_too_many_logits_is_computed_in_chunks(
    models: list[LoadedModel], small_spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = figures(models, small_spec, window=100, stride=60)
    monkeypatch.setattr(passes, "MOST_LOGITS", 17 * models[0].runner.vocabulary)
    parts = figures(models, small_spec, window=100, stride=60)
    assert parts[0]["batch"] == 1
    assert_same(parts, whole, exactly=isinstance(models[0].runner, DecoderCPURunner))


@pytest.mark.parametrize("kept", [5, 9])
def test_texts_scored_together_have_the_logits_of_each(models: list[LoadedModel], kept: int) -> None:
    texts = [[40, 41, 42, 60, 61, 62, 63, 90, 91], [7] * 9, list(range(200, 209))]
    for model in models:
        found = model.runner.score_together(texts, kept)
        assert (found.shape, found.dtype) == ((3, kept, model.runner.vocabulary), torch.float32)
        for row, ids in zip(found, texts, strict=True):
            torch.testing.assert_close(row, model.runner.score(ids)[-kept:], atol=2e-4, rtol=1e-4)
            assert not isinstance(model.runner, DecoderCPURunner) or torch.equal(
                row, model.runner.score(ids)[-kept:]
            )


class Counted(FakeRunner):
    """Counts the logits that exist at a time, over all such runners."""

    now = most = 0

    def counted(self, logits: Tensor) -> Tensor:
        array = logits.numpy().copy()
        Counted.now += array.size
        Counted.most = max(Counted.most, Counted.now)
        weakref.finalize(array, self._gone, array.size)
        return torch.from_numpy(array)  # which holds the array as long as anybody holds a view of it

    @staticmethod
    def _gone(size: int) -> None:
        Counted.now -= size

    def score_together(self, texts: Sequence[Sequence[int]], kept: int) -> Tensor:
        return self.counted(super().score_together(texts, kept))

    def prefill(self, slot: int, ids: Sequence[int], logits: Any = "last") -> Tensor | None:
        found = super().prefill(slot, ids, logits)
        return None if found is None else self.counted(found)


@pytest.mark.parametrize(("window", "rows"), [(32, 100), (200, 60)])
@pytest.mark.parametrize("length", [1, 4])
def test_no_more_logits_exist_than_two_models_may_have(
    small_spec: ModelSpec, window: int, rows: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    runners = [Counted() for _ in range(4)]
    models = [fake_model(name, runner) for name, runner in zip("abcd", runners, strict=True)]
    allowed = rows * runners[0].vocabulary
    monkeypatch.setattr(passes, "MOST_LOGITS", allowed)
    monkeypatch.setattr(Counted, "most", 0)
    tokenizer = load_tokenizer(small_spec.checkpoint)
    (found, *_) = measure(
        models[0], models[1:], text(WORDS[:900] * length), tokenizer, window=window, prompts=0
    )
    assert found.batch == (6 if window == 32 else 1)
    assert allowed < Counted.most <= 2 * allowed
    assert Counted.now == 0
    assert not any(runner.held for runner in runners)


def test_how_many_are_computed_together() -> None:
    def batch(models: list[LoadedModel], window: int, asked: int | None = None) -> int:
        return Passes.of(models, window, None, asked).batch

    one, device = fake_model(), fake_model("nf4", FakeDeviceRunner())
    assert batch([one], 64) == passes.PAYS // 64
    assert batch([one, device], 64) == passes.PAYS // 64
    assert batch([device, device], 64) == passes.PAYS_ON_A_DEVICE // 64
    assert batch([one], 64, 3) == 3
    assert batch([one], 64, 10**9) == passes.MOST_TOKENS // 64
    one.runner.vocabulary = 2**20  # 64 tokens' logits are held
    assert batch([one], 64, 10**9) == 2
    assert batch([one], 256) == 1


def test_windows_run_alone_if_batching_would_change_them() -> None:
    outliers = replace(fake_model("int8"), details={"outlier_threshold": 6.0})
    assert Passes.of([fake_model(), outliers], 32, None).batch == 1
    assert (
        Passes.of([fake_model(), replace(outliers, details={"outlier_threshold": 0.0})], 32, None).batch > 1
    )


def test_windows_of_a_batch_are_alike() -> None:
    found = list(batches(windows(range(100), 20, 10), 3))
    assert [len(several) for several in found] == [1, 3, 3, 2]
    assert [window for several in found for window in several] == list(windows(range(100), 20, 10))
    assert list(batches([Window([1, 2], 1), Window([3, 4], 1), Window([5, 6, 7], 1)], 2)) == [
        [Window([1, 2], 1), Window([3, 4], 1)],
        [Window([5, 6, 7], 1)],
    ]
