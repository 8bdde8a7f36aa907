"""Whether a precision computes the right results on this device, bit for bit where possible."""

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import loaders
from loaders.base import LoadedModel, ModelSpec
from loaders.cuda.cuda_graphs import release_unused
from loaders.cuda.graph_runner import GraphRunner
from loaders.cuda.memory import card_free
from server.bench.reference import load_reference
from server.bench.session import prompts_of
from server.host.memory import used_bytes

_STEPS = 6
_TOKENS = 24  # compared with generate's
_TOLERATED = 0.05  # between our count and the allocator's
_ROUNDING = 96 * 2**20  # of allocator segments and library workspaces


@dataclass(frozen=True)
class Memory:
    """Bytes on the GPU since before loading."""

    told: int
    """Weights, cache and working memory, as counted for /stats."""
    allocated: int
    reserved: int
    left_behind: int
    """Still allocated after closing."""

    @property
    def agrees(self) -> bool:
        return abs(self.told - self.reserved) <= max(_TOLERATED * self.reserved, _ROUNDING)


@dataclass(frozen=True)
class Correctness:
    """Results of one precision. None where not applicable."""

    precision: str
    captured: bool
    not_captured_because: str | None
    equals_eager: bool | None
    """Every logit of a replayed step equals that of the same step launched kernel by kernel."""
    isolated: bool
    """Every logit of a sequence is the same alone and among others that fill all slots."""
    farthest: float
    """Largest difference of a logit alone and among others."""
    same_as_generate: float
    """Greedy tokens that equal those of ``generate`` on the same weights, up to the first difference."""
    memory: Memory | None
    seconds: float

    def line(self) -> str:
        taken = (
            f"{self.memory.told:,} bytes told, {self.memory.reserved:,} taken" if self.memory else "no card"
        )
        return (
            f"{self.precision:<5} captured: {_word(self.captured)}, "
            f"equal to launched: {_word(self.equals_eager)}, "
            f"isolated: {_word(self.isolated)} ({self.farthest:.2g}), generate's tokens: "
            f"{self.same_as_generate:.0%}; {taken}; {self.seconds:.1f} s"
        )

    def faults(self, on_card: bool) -> list[str]:
        """Descriptions of the failed checks."""
        found = []
        if on_card and not self.captured:
            found.append(f"not captured: {self.not_captured_because}")
        if self.equals_eager is False:
            found.append("a replayed step differs from the same step launched kernel by kernel")
        if not self.isolated:
            found.append(f"a sequence's logits depend on its batch-mates (by up to {self.farthest:.2g})")
        if self.precision == "fp32" and self.same_as_generate < 0.9:
            found.append(f"only {self.same_as_generate:.0%} of generate's tokens")
        if self.memory is not None and not self.memory.agrees:
            found.append(f"tells {self.memory.told} bytes where the card gave {self.memory.reserved}")
        if self.memory is not None and self.memory.left_behind > _ROUNDING:
            found.append(f"{self.memory.left_behind} bytes are still taken after unloading")
        return [f"{self.precision}: {fault}" for fault in found]


def _word(answer: bool | None) -> str:
    return {True: "yes", False: "NO", None: "–"}[answer]


def check(precision: str, spec: ModelSpec) -> Correctness:
    """Loads the precision as a server with these settings would, checks it and closes it.

    Without a GPU its steps are launched on the CPU, uncaptured: a rehearsal of the check.
    """
    started = time.perf_counter()
    before = _taken() if spec.device == "cuda" else None
    with _loaded(precision, spec) as (runner, loaded):
        _run(runner, _work(runner))
        memory = _memory(loaded, before) if loaded is not None and before is not None else None
        report = runner.report()
        eager = _equals_eager(runner, spec) if runner.captured else None
        isolated, farthest = _isolated(runner)
        same = _same_as_generate(runner)
    if memory is not None and before is not None:
        memory = Memory(memory.told, memory.allocated, memory.reserved, _taken()[0] - before[0])
    because = report["not_captured_because"]
    seconds = time.perf_counter() - started
    return Correctness(
        precision, report["captured"], because, eager, isolated, farthest, same, memory, seconds
    )


@contextmanager
def _loaded(precision: str, spec: ModelSpec) -> Iterator[tuple[GraphRunner, LoadedModel | None]]:
    if spec.device == "cpu":
        model = load_reference(precision, spec)
        yield GraphRunner(model, spec, None, why_not="there is no GPU"), None
        return
    loaded = loaders.load(precision, spec)
    try:
        if not isinstance(loaded.runner, GraphRunner):
            raise TypeError(f"it runs by {type(loaded.runner).__name__}, which captures nothing")
        yield loaded.runner, loaded
    finally:
        loaded.close()


def _taken() -> tuple[int, int]:
    """Allocated and reserved bytes of the GPU, after releasing caches."""
    gc.collect()
    release_unused()
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


def _memory(loaded: LoadedModel, before: tuple[int, int]) -> Memory:
    allocated, reserved = _taken()
    return Memory(used_bytes(loaded), allocated - before[0], reserved - before[1], 0)


Work = list[tuple[int, list[int]]]
"""Slots and their prompts."""


def _work(runner: GraphRunner) -> Work:
    """A prompt in every slot: most short, every fourth as long as half the context."""
    found: Work = []
    for slot in range(runner.slots):
        length = runner.context // 2 + slot if slot % 4 == 3 else 5 + 3 * slot
        (prompt,) = prompts_of(1, min(length, runner.context - _STEPS - 1), runner.vocabulary)
        found.append((slot, prompt))
    return found


def _run(runner: GraphRunner, work: Work, watched: int | None = None) -> list[Tensor]:
    """Prefills, decodes some steps, frees; returns the logits of all rows, or of the watched slot."""
    slots, found = [slot for slot, _ in work], []
    for slot, prompt in work:
        logits = runner.prefill(slot, prompt)
        assert logits is not None
        if watched in (None, slot):
            found.append(logits.clone())
    for step in range(_STEPS):
        logits = runner.decode(slots, [(7 * step + 11) % runner.vocabulary] * len(slots))
        found.append((logits if watched is None else logits[slots.index(watched)][None]).clone())
    for slot in slots:
        runner.free(slot)
    return found


def _equals_eager(runner: GraphRunner, spec: ModelSpec) -> bool:
    free = card_free() if spec.device == "cuda" else None
    eager = GraphRunner(runner.module, spec, None, why_not="to compare with", free=free)
    work = _work(runner)[: eager.slots]
    pairs = zip(_run(runner, work), _run(eager, work), strict=True)
    return all(torch.equal(replayed, launched) for replayed, launched in pairs)


def _isolated(runner: GraphRunner) -> tuple[bool, float]:
    """Compares the logits of a sequence alone and among others prefilled before it."""
    work = _work(runner)
    slot, prompt = work[len(work) // 2]
    alone = _run(runner, [(slot, prompt)], slot)
    among = _run(runner, [*(one for one in work if one[0] != slot), (slot, prompt)], slot)
    differences = [float((a - b).abs().max()) for a, b in zip(alone, among, strict=True)]
    return all(torch.equal(a, b) for a, b in zip(alone, among, strict=True)), max(differences)


def _same_as_generate(runner: GraphRunner) -> float:
    (prompt,) = prompts_of(1, 12, runner.vocabulary)
    tokens = min(_TOKENS, runner.context - len(prompt) - 1)
    logits = runner.prefill(0, prompt)
    assert logits is not None
    ours = [int(logits.argmax())]
    while len(ours) < tokens:
        ours.append(int(runner.decode([0], ours[-1:]).argmax()))
    runner.free(0)
    return _agreement(ours, _generated(runner.module, prompt, tokens))


def _generated(model: Any, prompt: list[int], tokens: int) -> list[int]:
    ids = torch.tensor([prompt], dtype=torch.int64, device=model.device)
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    found: list[int] = output[0, len(prompt) :].tolist()
    return found


def _agreement(ours: Sequence[int], theirs: Sequence[int]) -> float:
    differs = (i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    return next(differs, len(ours)) / len(ours)
