"""Quality against a slow reference computation, against ``transformers``' own loss, and in edge cases."""

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import loaders
from loaders.base import LoadedModel, ModelSpec
from loaders.checkpoint import load_tokenizer, open_checkpoint
from loaders.quality import Quality, QualityError, measure
from loaders.quality.divergence import BLOCK
from loaders.runners.decoder_cpu_runner import DecoderCPURunner
from loaders.texts import Text, TextError, held_out, text_file
from tests.fakes import FakeRunner, fake_model

WORDS = "the naïve café – in an other theatre, 東京 and then there …\n    indented, and again\n" * 24


def text_of(content: str | bytes, folder: Path) -> Text:
    path = folder / "text.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return text_file(path)


@pytest.fixture(scope="module")
def reference(small_spec: ModelSpec) -> LoadedModel:
    return loaders.load("fp32", small_spec)


@pytest.fixture(scope="module")
def candidate(small_spec: ModelSpec) -> LoadedModel:
    return loaders.load("nf4", small_spec)


def log_softmax(logits: torch.Tensor) -> Any:
    values = logits.numpy().astype(np.float64)
    values = values - values.max()
    return values - np.log(np.exp(values).sum())


def by_hand(
    reference: LoadedModel, candidate: LoadedModel, ids: list[int], size: int, length: int, stride: int
) -> dict[str, float]:
    """Token by token; windows as in Hugging Face's page on the perplexity of fixed-length models."""
    nll, excess, kl, same, squares, blocks = [], [], [], [], [], []
    scored_to = 1
    for begin in range(0, len(ids), stride):
        end = min(begin + length, len(ids))
        p_rows, q_rows = (model.runner.score(ids[begin:end]) for model in (reference, candidate))
        block: list[tuple[float, float]] = []
        for at in range(max(scored_to, begin + 1), end):
            p, q = log_softmax(p_rows[at - begin - 1]), log_softmax(q_rows[at - begin - 1])
            true = ids[at]
            nll.append(-q[true])
            excess.append(p[true] - q[true])
            kl.append(sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))
            same.append(p.argmax() == q.argmax())
            squares.append((math.exp(q[true]) - math.exp(p[true])) ** 2)
            block.append((excess[-1], kl[-1]))
            if len(block) == BLOCK:
                blocks.append(block)
                block = []
        if block:
            blocks.append(block)
        scored_to = end
        if end == len(ids):
            break

    def error(column: int, mean: float) -> float:
        spread = sum(sum(row[column] - mean for row in block) ** 2 for block in blocks)
        return math.sqrt(spread * len(blocks) / (len(blocks) - 1)) / len(nll)

    ratio = math.exp(np.mean(excess))
    return {
        "tokens": len(ids),
        "scored": len(nll),
        "perplexity": math.exp(np.mean(nll)),
        "bits_per_byte": float(np.mean(nll)) / math.log(2) * len(ids) / size,
        "perplexity_ratio": ratio,
        "perplexity_ratio_error": ratio * error(0, float(np.mean(excess))),
        "mean_kl": float(np.mean(kl)),
        "mean_kl_error": error(1, float(np.mean(kl))),
        "median_kl": float(np.quantile(kl, 0.5, method="inverted_cdf")),
        "p99_kl": float(np.quantile(kl, 0.99, method="inverted_cdf")),
        "max_kl": max(kl),
        "top1_agreement": float(np.mean(same)),
        "rms_delta_p": math.sqrt(np.mean(squares)),
    }


@pytest.mark.parametrize(("length", "stride"), [(100, 40), (64, 64), (200, 7), (256, 128)])
def test_every_figure_equals_the_obvious_computation(
    small_spec: ModelSpec,
    reference: LoadedModel,
    candidate: LoadedModel,
    length: int,
    stride: int,
    tmp_path: Path,
) -> None:
    content = WORDS[: 400 if stride == 7 else 1100]
    tokenizer = load_tokenizer(small_spec.checkpoint)
    ids = tokenizer(content)["input_ids"]
    expected = by_hand(reference, candidate, ids, len(content.encode()), length, stride)
    (found,) = measure(
        reference, [candidate], text_of(content, tmp_path), tokenizer, window=length, stride=stride
    )
    # windows are computed together, which transformers' own forward rounds differently
    near = 1e-7 if isinstance(reference.runner, DecoderCPURunner) else 1e-4
    for name, value in expected.items():
        histogram = name in ("median_kl", "p99_kl")
        assert getattr(found, name) == pytest.approx(value, rel=0.003 if histogram else near), name
    assert (found.window, found.stride, found.reference) == (length, stride, "fp32")


def test_perplexity_is_that_of_transformers_own_loss(
    small_spec: ModelSpec, reference: LoadedModel, tmp_path: Path
) -> None:
    tokenizer, content = load_tokenizer(small_spec.checkpoint), WORDS[:150]
    ids = torch.tensor([tokenizer(content)["input_ids"]])
    model = AutoModelForCausalLM.from_pretrained(small_spec.checkpoint.folder, local_files_only=True)
    with torch.inference_mode():
        loss = float(model(ids, labels=ids).loss)
    (found,) = measure(reference, [reference], text_of(content, tmp_path), tokenizer)
    assert ids.shape[1] < found.window
    assert math.log(found.perplexity) == pytest.approx(loss, abs=1e-5)
    assert found.scored == ids.shape[1] - 1


def test_a_model_against_itself_differs_in_nothing(
    small_spec: ModelSpec, reference: LoadedModel, tmp_path: Path
) -> None:
    stages: list[tuple[str, int, int]] = []
    (found,) = measure(
        reference,
        [reference],
        text_of(WORDS, tmp_path),
        load_tokenizer(small_spec.checkpoint),
        progress=lambda *step: stages.append(step),
    )
    assert found.perplexity == found.reference_perplexity
    assert (found.perplexity_ratio, found.perplexity_ratio_error) == (1.0, 0.0)
    assert (found.mean_kl, found.median_kl, found.p99_kl, found.max_kl) == (0.0, 0.0, 0.0, 0.0)
    assert (found.top1_agreement, found.rms_delta_p) == (1.0, 0.0)
    assert found.greedy is not None
    assert found.greedy.diverged == 0
    assert found.greedy.mean_tokens == found.greedy.median_tokens == found.greedy.tokens
    scoring = [(now, total) for stage, now, total in stages if stage == "scoring"]
    assert scoring[-1] == (found.tokens, found.tokens)
    assert stages[-1] == ("continuing", 2, 2)


def rounded_to_three_bits(spec: ModelSpec, folder: Path) -> ModelSpec:
    """A model with every matrix of the body rounded to seven levels a channel."""
    shutil.copytree(spec.checkpoint.folder, folder)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if ".h." in name and weight.dim() == 2:
            scale = weight.abs().amax(0, keepdim=True) / 3
            weights[name] = (weight / scale).round() * scale
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return replace(spec, checkpoint=open_checkpoint(str(folder)))


def test_a_degraded_copy_ranks_last_by_every_measure(tmp_path: Path) -> None:
    spec = ModelSpec(open_checkpoint("bundled"), slots=16)
    models = [loaders.load(name, spec) for name in ("fp32", "bf16", "dynamic-int8", "nf4")]
    models.append(loaders.load("fp32", rounded_to_three_bits(spec, tmp_path / "rounded")))
    with held_out().open() as stream:
        part = text_of(stream.read(8000), tmp_path)
    found = measure(models[0], models, part, load_tokenizer(spec.checkpoint))
    worse = ("perplexity_ratio", "mean_kl", "median_kl", "p99_kl", "max_kl", "rms_delta_p", "bits_per_byte")
    for name in worse:
        assert max(found, key=lambda one: getattr(one, name)) is found[-1], name
    assert min(found, key=lambda one: one.top1_agreement) is found[-1]
    assert min(found, key=same_tokens) is found[-1]
    assert [one.mean_kl for one in found] == sorted(one.mean_kl for one in found)


def same_tokens(quality: Quality) -> float:
    assert quality.greedy is not None
    return quality.greedy.mean_tokens


class Scripted(FakeRunner):
    """Continues as a ``FakeRunner`` does, but from the given length on with another letter."""

    def __init__(self, turn: int, slots: int) -> None:
        super().__init__(slots)
        self.turn = turn

    def next_id(self, ids: Sequence[int]) -> int:
        return super().next_id(ids) + (len(ids) >= self.turn)


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_the_first_divergence_of_greedy_continuations_is_found(
    small_spec: ModelSpec, slots: int, tmp_path: Path
) -> None:
    content = WORDS[:700]
    one = fake_model("fp32", FakeRunner(slots))
    other = fake_model("int8", Scripted(32 + 10, slots))
    (found,) = measure(
        one, [other], text_of(content, tmp_path), load_tokenizer(small_spec.checkpoint), window=128, prompts=5
    )
    assert found.greedy is not None
    assert (found.greedy.prompts, found.greedy.diverged, found.greedy.tokens) == (5, 5, 64)
    assert (found.greedy.mean_tokens, found.greedy.median_tokens) == (10, 10)
    assert isinstance(one.runner, FakeRunner)
    assert not one.runner.held


def test_no_prompts_no_continuations(reference: LoadedModel, small_spec: ModelSpec, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(small_spec.checkpoint)
    (found,) = measure(reference, [reference], text_of("the cat", tmp_path), tokenizer, prompts=0)
    assert found.greedy is None


def test_two_tokens_are_enough(reference: LoadedModel, candidate: LoadedModel, small_spec: ModelSpec) -> None:
    tokenizer = load_tokenizer(small_spec.checkpoint)
    (found,) = measure(reference, [candidate], Text("two", 2, lambda: BytesIO(b"xy")), tokenizer)
    assert (found.tokens, found.scored) == (2, 1)
    assert found.perplexity_ratio_error is None
    assert found.mean_kl == found.max_kl == pytest.approx(found.median_kl, rel=0.003)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 tokens; at least two are needed"),
        (b"x", "has 1 tokens; at least two are needed"),
        ("Grüße".encode("latin-1"), "is not UTF-8 text"),
        (b"cut short \xe2\x82", "is not UTF-8 text"),
    ],
)
def test_texts_that_cannot_be_measured(
    reference: LoadedModel, small_spec: ModelSpec, content: bytes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(TextError, match=message):
        measure(reference, [reference], text_of(content, tmp_path), load_tokenizer(small_spec.checkpoint))


@pytest.mark.parametrize(("window", "stride"), [(1, None), (257, None), (64, 0), (64, 65)])
def test_windows_that_do_not_fit(
    reference: LoadedModel, small_spec: ModelSpec, window: int, stride: int | None, tmp_path: Path
) -> None:
    with pytest.raises(QualityError, match=r"from (2|1) to"):
        measure(
            reference,
            [reference],
            text_of(WORDS, tmp_path),
            load_tokenizer(small_spec.checkpoint),
            window=window,
            stride=stride,
        )


def test_nan_logits_are_an_error(small_spec: ModelSpec, tmp_path: Path) -> None:
    class Broken(FakeRunner):
        def score_together(self, texts: Sequence[Sequence[int]], kept: int) -> torch.Tensor:
            return super().score_together(texts, kept) * float("nan")

    tokenizer = load_tokenizer(small_spec.checkpoint)
    with pytest.raises(QualityError, match="int8 gives logits that are not numbers"):
        measure(fake_model(), [fake_model("int8", Broken())], text_of(WORDS, tmp_path), tokenizer, window=32)
