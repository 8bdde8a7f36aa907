"""A model that doesn't fit the first of two cards. tests/test_emulated_card.py runs these tests on two."""

import gc
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import loaders
from loaders.base import ModelSpec
from loaders.checkpoint import open_checkpoint
from loaders.errors import OutOfMemory
from loaders.runners.transformers_runner import TransformersRunner
from tests import checkpoints
from tests.emulated_card import is_there
from tests.emulated_card.memory import cards

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not is_there() or len(cards) < 2, reason="there are not two emulated cards"),
]
MEGABYTES = 2**20
ROOMS = {"fp32": (4, 28), "int8": (4, 16), "nf4": (4, 8)}
"""Megabytes in which a precision can't be loaded; memory runs out at different points."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 MB in fp32."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=320, n_positions=64, n_embd=512, n_layer=4, n_head=8)
    return checkpoints.save(GPT2LMHeadModel(config).eval(), tmp_path_factory.mktemp("wide"))


@pytest.mark.parametrize(("precision", "error"), [("fp32", 1e-4), ("int8", 0.3), ("nf4", 2.0)])
def test_a_model_is_spread_over_both_cards(
    folder: Path, precision: str, error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if precision == "fp32":
        monkeypatch.setattr(cards[0], "total", cards[0].now + 40 * MEGABYTES)
    else:  # quantizing needs more memory than its result, and would not fit such a full card
        monkeypatch.setattr("loaders.cuda.memory.spread", lambda *_: "auto")
    monkeypatch.setattr("transformers.modeling_utils.caching_allocator_warmup", lambda *_: None)
    checkpoint = open_checkpoint(str(folder))
    one = loaders.load("fp32", ModelSpec(checkpoint, slots=2)).runner
    expected = one.prefill(0, [1, 2, 3]), one.decode([0], [5])
    before = [card.now for card in cards]
    loaded = loaders.load(precision, ModelSpec(checkpoint, device="cuda", slots=2))
    assert isinstance(loaded.runner, TransformersRunner)
    assert loaded.runner.report()["not_captured_because"] == "the model is spread over 2 devices"
    assert all(card.now - was > MEGABYTES for card, was in zip(cards, before, strict=True))
    found = loaded.runner.prefill(0, [1, 2, 3]), loaded.runner.decode([0], [5])
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is not None
        assert theirs is not None
        assert float((ours.cpu() - theirs).abs().max()) < error
    loaded.close()
    del loaded, found, ours
    gc.collect()
    assert all(card.now - was < MEGABYTES for card, was in zip(cards, before, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "int8", "nf4"])
def test_out_of_memory_is_reported_as_such(
    folder: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every point: ``transformers`` reports an exception of quantization as a broken checkpoint."""
    checkpoint = open_checkpoint(str(folder))
    monkeypatch.setattr("loaders.cuda.memory.cards_free", lambda: [2**40])
    monkeypatch.setattr("transformers.modeling_utils.caching_allocator_warmup", lambda *_: None)
    gc.collect()
    before = cards[0].now  # once: memory that a traceback still holds later must not count as free
    for room in ROOMS[precision]:
        monkeypatch.setattr(cards[0], "total", before + room * MEGABYTES)
        with pytest.raises(OutOfMemory):
            loaders.load(precision, ModelSpec(checkpoint, device="cuda", slots=2))
        gc.collect()
