"""Greedy continuations of the same prompts by two models, and how long they agree."""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from loaders.runner import Runner
from loaders.texts.text import Window

PROMPT, CONTINUATION, PROMPTS = 32, 64, 16
_SPACING = 128  # tokens of text between candidate prompts


@dataclass(frozen=True)
class GreedyDivergence:
    """The length of the agreement. Generation continues after an end-of-text token.

    Args:
        prompts: number of prompts.
        tokens: generated per prompt.
        diverged: prompts whose continuations differ.
        mean_tokens: mean number of tokens before the first difference; all tokens if there is none.
        median_tokens: the median.
    """

    prompts: int
    tokens: int
    diverged: int
    mean_tokens: float
    median_tokens: float


class Prompts:
    """Picks evenly spaced prompts from a text of unknown length; holds at most twice as many.

    Args:
        count: most prompts to pick.
        context: of the models, in tokens.
    """

    def __init__(self, count: int, context: int) -> None:
        self._count, self._length = count, max(1, min(PROMPT, context // 2))
        self.tokens = min(CONTINUATION, context - self._length)
        self._held: list[list[int]] = []
        self._seen, self._step = 0, 1

    def offer(self, window: Window) -> None:
        fresh = window.ids if window.first == 1 else window.scored
        for start in range(0, len(fresh), _SPACING):
            prompt = fresh[start : start + self._length]
            if len(prompt) == self._length or not self._seen:  # a short text gives one short prompt
                self._consider(prompt)

    def _consider(self, prompt: list[int]) -> None:
        if self._seen % self._step == 0:
            self._held.append(prompt)
        self._seen += 1
        if len(self._held) > 2 * self._count:
            self._held, self._step = self._held[::2], self._step * 2

    def chosen(self) -> list[list[int]]:
        held, count = self._held, min(self._count, len(self._held))
        return [held[i * len(held) // count] for i in range(count)]


def continuations(runner: Runner, prompts: Sequence[list[int]], tokens: int, rows: int) -> list[list[int]]:
    """The greedy continuation of each prompt, ``rows`` decoded together."""
    return [ids for group in _groups(prompts, rows) for ids in _transposed(_steps(runner, group, tokens))]


def divergence(
    runner: Runner, prompts: Sequence[list[int]], expected: Sequence[list[int]], rows: int
) -> GreedyDivergence:
    """Continues the prompts with another model until every row differs from ``expected``, or to the end."""
    tokens = len(expected[0])
    same = [
        length
        for group, wanted in zip(_groups(prompts, rows), _groups(expected, rows), strict=True)
        for length in _same_tokens(_steps(runner, group, tokens), wanted)
    ]
    diverged = sum(length < tokens for length in same)
    return GreedyDivergence(len(same), tokens, diverged, statistics.mean(same), statistics.median(same))


def _same_tokens(steps: Iterable[list[int]], expected: Sequence[list[int]]) -> list[int]:
    same: list[int | None] = [None] * len(expected)
    for step, ids in enumerate(steps):
        for row, id_ in enumerate(ids):
            if same[row] is None and id_ != expected[row][step]:
                same[row] = step
        if all(length is not None for length in same):
            break
    return [len(expected[0]) if length is None else length for length in same]


def _steps(runner: Runner, prompts: Sequence[list[int]], tokens: int) -> Iterator[list[int]]:
    """Yields the next token of every prompt per step; no row ends early, so all batches are equal."""
    slots = list(range(len(prompts)))
    try:
        ids = []
        for slot, prompt in zip(slots, prompts, strict=True):
            logits = runner.prefill(slot, prompt)
            assert logits is not None
            ids.append(int(logits[-1].argmax()))
        yield ids
        for _ in range(tokens - 1):
            ids = runner.decode(slots, ids).argmax(-1).tolist()
            yield ids
    finally:
        for slot in slots:
            runner.free(slot)


def _groups(items: Sequence[list[int]], size: int) -> Iterator[Sequence[list[int]]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _transposed(steps: Iterable[list[int]]) -> list[list[int]]:
    return [list(row) for row in zip(*steps, strict=True)]
