"""The quality of engines in other processes, and the text on which it is measured."""

import asyncio
import runpy
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from loaders.checkpoint import load_tokenizer, open_checkpoint
from loaders.quality import measure
from loaders.texts import Text, TokenStream, held_out
from server.bench.comparison import Line, columns, lines, markdown
from server.bench.figures import Figures
from server.bench.processes import RemoteContender, WorkerProcess
from server.bench.quality import RemoteModel, RemoteRunner, excerpt
from server.bench.session import Row
from tests import checkpoints
from tests.checkpoints import VOCABULARY
from tests.fakes import FakeRunner, fake_model

ROOT = Path(__file__).resolve().parents[2]


class Remote(RemoteContender):
    """The fake model's logits, as another process would send them."""

    def __init__(self) -> None:
        self.name, self._fake = "remote", FakeRunner()

    def score(self, texts: Sequence[Sequence[int]], kept: int) -> np.ndarray:
        found: np.ndarray = self._fake.score_together(texts, kept).numpy()
        return found


def test_a_remote_engine_is_scored_and_continued_like_a_loaded_model() -> None:
    data = b"the rain in Spain and the weather " * 30
    text = Text("rain", len(data), lambda: BytesIO(data))
    remote = RemoteModel("remote", RemoteRunner(Remote(), 256, VOCABULARY))
    [found] = measure(fake_model(), [remote], text, checkpoints.byte_tokenizer(), window=32, prompts=3)
    assert found.precision == "remote"
    assert found.mean_kl == 0.0
    assert found.perplexity == found.reference_perplexity
    assert found.greedy is not None
    assert found.greedy.diverged == 0


def test_a_remote_runner_follows_each_slot() -> None:
    runner, fake = RemoteRunner(Remote(), 256, VOCABULARY), FakeRunner()
    assert runner.prefill(0, [5, 6], "none") is None
    runner.prefill(0, [7], "none")
    fake.prefill(0, [5, 6, 7], "none")
    for one in (runner, fake):
        one.prefill(1, [9], "none")
    assert torch.equal(runner.decode([1, 0], [3, 4]), fake.decode([1, 0], [3, 4]))
    runner.free(0)
    all_of_it = runner.prefill(0, [1, 2], "all")
    assert all_of_it is not None
    assert torch.equal(all_of_it, fake.score_together([[1, 2]], 2)[0])


def test_a_worker_sends_logits_in_a_file() -> None:
    async def load(process: WorkerProcess) -> RemoteContender:
        return await process.load("one", "counting", first=10)

    with WorkerProcess("tests.bench_worker") as process:
        contender = asyncio.run(load(process))
        assert np.array_equal(
            contender.score([[1, 2, 3], [4, 5, 6]], 2), np.array([[[2, 12], [3, 13]], [[5, 15], [6, 16]]])
        )


def test_an_excerpt_has_at_least_its_tokens_and_ends_with_a_word() -> None:
    tokenizer, text = checkpoints.byte_tokenizer(), held_out()
    short = excerpt(text, tokenizer, 2000)
    assert short.name == text.name
    ids = list(TokenStream(short, tokenizer))
    assert 2000 <= len(ids) < 2000 + 1100  # blocks of 1,024 bytes
    assert ids == list(TokenStream(text, tokenizer))[: len(ids)]
    with text.open() as stream:
        assert stream.read(short.size + 1)[-1:] == b" "
    whole = excerpt(short, tokenizer, 10**6)
    assert whole.size == short.size


def row(precision: str, engine: str, batch: int, rate: float, ratios: tuple[float, ...] = ()) -> Row:
    figures = Figures(100.0, rate, 0.1, 5.0, 1.0, 2.0)
    return Row(precision, batch, engine, figures, 2_500_000, ratios[0] if ratios else None, ratios)


def test_the_comparison_has_a_line_per_engine() -> None:
    rows = [
        row("nf4", "bitdial", 1, 30.0), row("nf4", "llama.cpp Q4_0", 1, 20.0, (1.5, 1.4)),
        row("nf4", "bitdial", 8, 90.0), row("nf4", "llama.cpp Q4_0", 8, 100.0, (0.9, 1.1)),
    ]  # fmt: skip
    found = lines(rows, {})
    assert [(line.engine, sorted(line.rows)) for line in found] == [
        ("bitdial", [1, 8]), ("llama.cpp Q4_0", [1, 8]),
    ]  # fmt: skip
    assert [column.name for column in columns(found)] == [
        "precision", "engine", "weights", "tok/s 1", "tok/s 8", "ratio 1", "ratio 8",
    ]  # fmt: skip
    assert markdown(found).splitlines()[2:] == [
        "| nf4 | bitdial | 2.5 | 30.0 | 90.0 | – | – |",
        "| nf4 | llama.cpp Q4_0 | 2.5 | 20.0 | 100.0 | 1.50 | 0.90? |",
    ]
    assert found[1].figures()["bitdial_ratio"] == {"1": 1.5, "8": 0.9}


@pytest.mark.parametrize(
    ("kl", "shown"), [(0.30249, "0.3025"), (0.00012, "0.0001"), (3.2e-7, "3e-07"), (2e-12, "0")]
)
def test_a_small_divergence_is_still_shown(kl: float, shown: str) -> None:
    class Found:
        perplexity, mean_kl, mean_kl_error, top1_agreement = 21.6931, kl, None, 0.9494

    found: Any = Found()
    line = Line("fp16", "bitdial", None, {1: row("fp16", "bitdial", 1, 3.0)}, found)
    assert markdown([line]).splitlines()[-1] == f"| fp16 | bitdial | – | 21.693 | {shown} | 94.9 | 3.0 | – |"


def parameters(config: Any) -> int:
    with torch.device("meta"):  # sizes only
        return sum(one.numel() for one in AutoModelForCausalLM.from_config(config).parameters())


def test_a_random_checkpoint_has_the_shape_that_is_asked_for(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "random_checkpoint.py"))
    # the published sizes; a tied head counts once
    assert {name: parameters(config) for name, config in script["SHAPES"].items()} == {
        "gpt2": 124_439_808,
        "smollm2-135m": 134_515_008,
        "qwen2.5-0.5b": 494_032_768,
    }
    small = Qwen2Config(
        vocab_size=400, hidden_size=56, intermediate_size=64, num_hidden_layers=2, num_attention_heads=14,
        num_key_value_heads=2,
    )  # fmt: skip
    checkpoint = open_checkpoint(str(script["make"](small, tmp_path / "qwen")))
    assert (checkpoint.architecture, checkpoint.vocabulary) == ("Qwen2ForCausalLM", 400)
    assert checkpoint.config.num_key_value_heads == 2
    assert len(load_tokenizer(checkpoint)) == 400
