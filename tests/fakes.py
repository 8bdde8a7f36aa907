"""A model without weights: its next token is a function of the previous ones, and it fails on demand."""

import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import GPT2Config

from loaders.base import Checkpoint, Footprint, LoadedModel, ModelSpec, Progress, ignore_progress
from loaders.runner import Logits, Runner
from server.observability.ended import Ended, SpanIds
from tests.checkpoints import VOCABULARY, byte_tokenizer

_FIRST, _LETTERS = 65, 26  # ids of "a" … "z" in the byte alphabet of tests/checkpoints.py


class FakeRunner(Runner):
    """Predicts after every context a letter that depends on all of it; the rest of the distribution is flat.

    Hooks: ``delay``, seconds per call; ``on_prefill(slot, ids)`` and ``on_decode(slots)`` are called first
    and may raise; ``poison`` maps logits before they are returned.
    """

    def __init__(self, slots: int = 4, context: int = 256) -> None:
        self.slots, self.context, self.vocabulary = slots, context, VOCABULARY
        self.held: dict[int, list[int]] = {}
        self.delay = 0.0
        self.on_prefill: Callable[[int, Sequence[int]], None] = lambda slot, ids: None
        self.on_decode: Callable[[Sequence[int]], None] = lambda slots: None
        self.poison: Callable[[Tensor, Sequence[int]], Tensor] = lambda logits, slots: logits
        self.batches: list[int] = []
        self.closed = False
        self.threads: set[int] = set()

    def next_id(self, ids: Sequence[int]) -> int:
        return _FIRST + sum((i + 1) * id_ for i, id_ in enumerate(ids)) % _LETTERS

    def _logits(self, ids: Sequence[int]) -> Tensor:
        row = torch.zeros(self.vocabulary)
        row[self.next_id(ids)] = 8.0
        return row

    def prefill(self, slot: int, ids: Sequence[int], logits: Logits = "last") -> Tensor | None:
        self._called()
        self.on_prefill(slot, ids)
        before = self.held.get(slot, [])
        now = self.held[slot] = [*before, *ids]
        assert len(now) <= self.context, "more tokens than the slot holds"
        if logits == "none":
            return None
        ends = range(len(before) + 1, len(now) + 1) if logits == "all" else [len(now)]
        return self.poison(torch.stack([self._logits(now[:end]) for end in ends]), [slot])

    def decode(self, slots: Sequence[int], ids: Sequence[int]) -> Tensor:
        self._called()
        self.on_decode(slots)
        self.batches.append(len(slots))
        for slot, id_ in zip(slots, ids, strict=True):
            self.held[slot].append(id_)
            assert len(self.held[slot]) <= self.context, "more tokens than the slot holds"
        return self.poison(torch.stack([self._logits(self.held[slot]) for slot in slots]), slots)

    def score_together(self, texts: Sequence[Sequence[int]], kept: int) -> Tensor:
        rows = [[self._logits(ids[:end]) for end in range(1, 1 + len(ids))][-kept:] for ids in texts]
        return torch.stack([torch.stack(row) for row in rows])

    def free(self, slot: int) -> None:
        self.held.pop(slot, None)

    def close(self) -> None:
        self.closed = True

    @property
    def kv_cache_bytes(self) -> int:
        return self.slots * self.context * 8

    def _called(self) -> None:
        self.threads.add(threading.get_ident())
        if self.delay:
            time.sleep(self.delay)

    def expected(self, prompt: Sequence[int], count: int) -> list[int]:
        """The greedy continuation of a prompt."""
        ids = list(prompt)
        for _ in range(count):
            ids.append(self.next_id(ids))
        return ids[len(prompt) :]


class FakeDeviceRunner(FakeRunner):
    """Behaves like an accelerator's Runner: it continues from tokens that the host has not read.

    Like captured steps, it returns logits in a fixed tensor, which the next call overwrites.
    """

    working_bytes = 64

    def __init__(self, slots: int = 4, context: int = 256) -> None:
        super().__init__(slots, context)
        self._static = torch.zeros(slots, self.vocabulary)
        self.ahead = 0

    def decode(self, slots: Sequence[int], ids: Sequence[int]) -> Tensor:
        found = self._static[: len(slots)]
        found.copy_(super().decode(slots, ids))
        return found

    def decode_from(self, slots: Sequence[int], tokens: Tensor) -> Tensor:
        assert (tokens.dtype, tokens.shape) == (torch.int64, (len(slots),))
        self.ahead += 1
        return self.decode(slots, tokens.tolist())


def fake_model(precision: str = "fp32", runner: FakeRunner | None = None) -> LoadedModel:
    footprint = Footprint(4000, {"float32": 4000}, {}, 4000, 32.0, 1000)
    return LoadedModel(precision, runner or FakeRunner(), footprint, load_seconds=0.01)


def fake_checkpoint(folder: Path, context: int = 256) -> Checkpoint:
    """A checkpoint with a real tokenizer and configuration, but no weights."""
    config, files = _config_and_files(context)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return Checkpoint("fake", None, folder, config, "GPT2LMHeadModel", context, VOCABULARY, frozenset({0}), 0)


@cache
def _config_and_files(context: int) -> tuple[GPT2Config, dict[str, bytes]]:
    """Made once: most tests have a checkpoint. Nothing changes a checkpoint's configuration."""
    # one layer: its shapes are built, without weights, at every start
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=context, n_layer=1)
    with tempfile.TemporaryDirectory() as made:
        byte_tokenizer().save_pretrained(made)
        config.save_pretrained(made)
        return config, {file.name: file.read_bytes() for file in Path(made).iterdir()}


def fake_load(precision: str, spec: ModelSpec, progress: Progress = ignore_progress) -> LoadedModel:
    """Replaces ``loaders.load``."""
    progress("loading", 1, 1)
    return fake_model(precision, FakeRunner(spec.slots, spec.max_tokens))


class Outcomes:
    """An observer that keeps what it was told: precision, outcome and prompt tokens of each request."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, int]] = []

    def observe_request(self, ended: Ended, span: SpanIds | None = None) -> None:
        self.seen.append((ended.precision, ended.outcome, ended.prompt_tokens))
