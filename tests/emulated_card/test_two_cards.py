"""A model that the first of two cards can't hold. Run by tests/test_emulated_card.py, where there are two."""

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
"""Megabytes in which a precision can't be loaded, for lack of room in one place or another."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 MB in fp32."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=320, n_positions=64, n_embd=512, n_layer=4, n_head=8)
    return checkpoints.save(GPT2LMHeadModel(config).eval(), tmp_path_factory.mktemp("wide"))


@pytest.mark.parametrize(("precision", "error"), [("fp32", 1e-4), ("int8", 0.3), ("nf4", 2.0)])
def test_it_is_spread_over_both(
    folder: Path, precision: str, error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if precision == "fp32":
        monkeypatch.setattr(cards[0], "total", cards[0].now + 40 * MEGABYTES)
    else:  # quantizing takes more than it leaves, and would not fit a card that is so full
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
def test_no_room_is_told_as_such(folder: Path, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it runs out: ``transformers`` takes what quantizing raises for a broken checkpoint."""
    checkpoint = open_checkpoint(str(folder))
    monkeypatch.setattr("loaders.cuda.memory.cards_free", lambda: [2**40])
    monkeypatch.setattr("transformers.modeling_utils.caching_allocator_warmup", lambda *_: None)
    gc.collect()
    before = cards[0].now  # once: what a fault's traceback still holds later must not make room
    for room in ROOMS[precision]:
        monkeypatch.setattr(cards[0], "total", before + room * MEGABYTES)
        with pytest.raises(OutOfMemory):
            loaders.load(precision, ModelSpec(checkpoint, device="cuda", slots=2))
        gc.collect()
