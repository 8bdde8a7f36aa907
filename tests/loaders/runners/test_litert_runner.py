"""The Runner of .tflite files, on steps that are computed here: chunks, batches, masks and growing caches."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from loaders.litert.model import Array, Output, StepCache
from loaders.litert.steps import Description, Signature
from loaders.runners.litert_runner import LiteRTRunner

VOCABULARY, LENGTHS, CONTEXT = 50, (8, 32, 40), 40
TEXT = [(7 * at + 3) % VOCABULARY for at in range(37)]


class SummingSteps:
    """One layer whose keys are tokens and whose values are positions.

    The logits of a token are the weighted sums of what it attends to: a wrong mask, position or cache
    changes them. Every length of the cache adds the same, so that they can be compared.
    """

    def __init__(self, window: int | None = None, queries: int = 1) -> None:
        self.description = Description(1, 1, 1, queries, VOCABULARY, {"attention": window}, {})
        sizes = ((1, 1), (1, 8))
        self.signatures: Sequence[Signature] = [
            Signature(*size, length) for size in sizes for length in LENGTHS
        ]
        self.ran: list[Signature] = []

    def new_cache(self, length: int) -> StepCache:
        keys, values = np.zeros((2, 1, length, 1), np.float32)
        return StepCache(length, [keys], [values], {})

    def run(
        self,
        step: Signature,
        tokens: Array,
        positions: Array,
        masks: Sequence[Sequence[Array]],
        caches: Sequence[StepCache],
    ) -> Output:
        assert step in self.signatures
        assert tokens.shape == positions.shape == (step.rows, step.tokens)
        self.ran.append(step)
        window = self.description.windows["attention"]
        logits = np.zeros((step.rows, step.tokens, VOCABULARY), np.float32)
        for row, (cache, mask) in enumerate(zip(caches, masks[0], strict=True)):
            assert cache.length == step.length == mask.shape[-1]
            seen = mask[0, : step.tokens] == 0
            past = (cache.keys[0][0, :, 0] * (1 + cache.values[0][0, :, 0])).astype(np.float64)
            for at in range(step.tokens):
                first = 0 if window is None else max(0, at - window + 1)
                own = tokens[row, first : at + 1] * (1 + positions[row, first : at + 1])
                logits[row, at] = np.sin(past[seen[at]].sum() + own.sum() + np.arange(VOCABULARY))
        new = [tokens.astype(np.float32)[:, None, :, None]], [positions.astype(np.float32)[:, None, :, None]]
        return Output(logits, *new)


def runner_of(steps: SummingSteps, slots: int = 6) -> LiteRTRunner:
    return LiteRTRunner(steps, {}, slots, CONTEXT)


def expected(text: Sequence[int], window: int | None = None) -> torch.Tensor:
    """The logits after the last token of a text, from the definition."""
    weighted = [id_ * (1 + at) for at, id_ in enumerate(text)]
    first = 0 if window is None else max(0, len(text) - window)
    return torch.sin(
        torch.tensor(float(sum(weighted[first:]))) + torch.arange(VOCABULARY, dtype=torch.float32)
    )


@pytest.mark.parametrize("window", [None, 5, 11])
@pytest.mark.parametrize("queries", [1, 3])
def test_chunks_and_decode_see_exactly_their_past(window: int | None, queries: int) -> None:
    runner = runner_of(SummingSteps(window, queries))
    assert runner.prefill(2, TEXT[:11], "none") is None
    chunk = runner.prefill(2, TEXT[11:30], "all")
    assert chunk is not None
    rows = [*chunk, *(runner.decode([2], [id_])[0].clone() for id_ in TEXT[30:])]
    for length, row in enumerate(rows, 12):
        torch.testing.assert_close(row, expected(TEXT[:length], window), atol=1e-3, rtol=0)
    torch.testing.assert_close(runner.score(TEXT)[11:], torch.stack(rows), atol=0, rtol=0)


def test_a_row_is_the_same_alone_and_beside_rows_of_other_lengths() -> None:
    mates = {0: TEXT[:3], 1: TEXT[:9], 3: TEXT[5:20], 4: TEXT[:30], 5: TEXT[2:5]}
    alone, together = runner_of(SummingSteps()), runner_of(SummingSteps())
    for slot, text in mates.items():
        together.prefill(slot, text)
    alone.prefill(1, mates[1])
    for id_ in range(20, 25):
        found = together.decode(list(mates), [id_ + slot for slot in mates])
        assert torch.equal(found[1], alone.decode([1], [id_ + 1])[0])


def test_a_cache_grows_with_its_text_and_is_used_again_without_traces() -> None:
    steps = SummingSteps()
    runner = runner_of(steps)
    runner.prefill(0, TEXT[:5])
    assert {step.length for step in steps.ran} == {8}
    assert runner.kv_cache_bytes == 2 * 4 * 8
    runner.prefill(0, TEXT[5:30])
    assert steps.ran[-1].length == 32
    runner.free(0)
    held = runner.kv_cache_bytes
    torch.testing.assert_close(runner.prefill(1, TEXT[:20]), expected(TEXT[:20])[None], atol=1e-3, rtol=0)
    assert runner.kv_cache_bytes == held
    runner.free(1)
    runner.free(1)


def test_what_does_not_fit_is_refused_and_a_closed_runner_raises() -> None:
    runner = runner_of(SummingSteps())
    with pytest.raises(ValueError, match="41 tokens do not fit a slot of 40"):
        runner.score([1] * 41)
    runner.prefill(0, [1] * 40, "none")
    with pytest.raises(ValueError, match="41 tokens do not fit"):
        runner.decode([0], [1])
    runner.close()
    assert runner.kv_cache_bytes == 0
    with pytest.raises(RuntimeError, match="closed"):
        runner.score([1])
