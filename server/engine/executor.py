"""Computes a plan's forward passes on the runner. An error ends only the sequence that raises it."""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from torch import Tensor

from loaders.runner import DeviceRunner, LengthRunner, Logits, MixedRunner, Runner
from server.engine.faults import run_isolated
from server.engine.logprobs import prompt_logprobs
from server.engine.overlap import Overlap
from server.engine.sampler import PendingTokens, Sampler
from server.engine.scheduler import Chunk, Plan
from server.engine.sequence import PromptToken, Sequence, Status
from server.errors import ServiceError


class Output(NamedTuple):
    """What a forward pass returned for ``rows``: the sequences that have a next token now, or end."""

    rows: list[Sequence]
    result: Tensor | PendingTokens | ServiceError | None
    """(rows, vocabulary) logits; tokens that the device is sampling; the error of the only row; or None: the
    only row ends with its prompt. Logits are valid until the next output is requested."""
    prompt_tokens: int = 0
    decoded_rows: int = 0


class Executor:
    """Makes the calls of one runner on the worker's thread."""

    def __init__(self, runner: Runner, sampler: Sampler) -> None:
        self._runner = runner
        self._overlap = Overlap(runner, sampler) if isinstance(runner, DeviceRunner) else None
        self._mixed = runner if isinstance(runner, MixedRunner) else None
        self._by_length = runner if isinstance(runner, LengthRunner) else None

    def close(self) -> None:
        self._overlap = None  # it holds tensors of the device
        self._runner.close()

    def forward(self, plan: Plan) -> Iterator[Output]:
        """Computes pass after pass, each when its output is requested.

        Raises:
            DeviceLost
        """
        chunks, rows = plan.chunks, plan.rows
        if chunks and rows and (logits := self._forward_mixed(chunks[0], rows)) is not None:
            yield _prompt_output(chunks[0], logits[:1])
            yield Output(rows, logits[1:], decoded_rows=len(rows))
            chunks, rows = chunks[1:], []
        for chunk in chunks:
            yield self._prefill(chunk)
        if self._overlap is not None:
            yield from self._decode_overlapped(self._overlap, rows)
        elif self._by_length is not None:
            yield from self._decode_by_length(self._by_length, rows, plan.token_budget)
        else:
            yield from self._decode(rows)

    def _forward_mixed(self, chunk: Chunk, rows: list[Sequence]) -> Tensor | None:
        """Logits of a prompt chunk and the rows by one pass over the weights; None if that isn't possible."""
        if self._mixed is None or chunk.sequence.needs_all_logits:
            return None
        slots, ids = [row.slot for row in rows], [row.generated[-1] for row in rows]
        logits, _ = run_isolated(partial(self._mixed.advance, chunk.sequence.slot, chunk.ids, slots, ids))
        if logits is not None:  # else chunk and rows are computed separately: one of them may succeed
            chunk.sequence.prefilled += chunk.length
        return logits

    def _prefill(self, chunk: Chunk) -> Output:
        logits, error = run_isolated(partial(self._prefill_chunk, chunk))
        return _prompt_output(chunk, logits) if error is None else Output([chunk.sequence], error)

    def _prefill_chunk(self, chunk: Chunk) -> Tensor | None:
        """(1, vocabulary) logits after the chunk; None unless it is the last or all logits are read."""
        sequence, ids = chunk.sequence, chunk.ids
        if self._by_length is not None and not chunk.start:
            self._by_length.expect(sequence.slot, len(sequence.prompt))
        wanted: Logits = "all" if sequence.needs_all_logits else "last" if chunk.is_last else "none"
        logits = self._runner.prefill(sequence.slot, ids, wanted)
        if wanted == "all" and logits is not None:
            _read_prompt_logits(sequence, chunk, logits)
        sequence.prefilled += chunk.length
        return logits[-1:] if logits is not None else None

    def _decode(self, rows: list[Sequence]) -> Iterator[Output]:
        """All rows in one pass; if it fails, each row in its own, so that only rows that fail alone end."""
        if not rows:
            return
        logits, error = run_isolated(partial(self._decode_rows, rows))
        if logits is not None:
            yield Output(rows, logits, decoded_rows=len(rows))
        elif len(rows) == 1:
            yield Output(rows, error, decoded_rows=1)
        else:
            for row in rows:
                yield from self._decode([row])

    def _decode_rows(self, rows: list[Sequence]) -> Tensor:
        return self._runner.decode([row.slot for row in rows], [row.generated[-1] for row in rows])

    def _decode_overlapped(self, overlap: Overlap, rows: list[Sequence]) -> Iterator[Output]:
        """Launches the rows' next step, then yields the tokens of the step before."""
        pending = overlap.take_pending()
        continuing = overlap.continuing_rows(rows, pending)
        launched = bool(continuing) and run_isolated(partial(overlap.launch, continuing, pending))[1] is None
        count = len(continuing) if launched else 0
        if pending is not None:
            yield Output(pending.rows, pending.tokens, decoded_rows=count)
        else:
            yield Output([], None, decoded_rows=count)
        if launched:
            overlap.drop_if_idle()
        else:  # a row needs its latest token on the host, or the launch failed
            yield from self._decode([row for row in rows if row.status is Status.RUNNING])

    def _decode_by_length(
        self, runner: LengthRunner, rows: list[Sequence], token_budget: int
    ) -> Iterator[Output]:
        """Decodes the ready rows; of the first other row, ``token_budget`` tokens are computed again."""
        ready = []
        for row in rows:
            is_ready, error = run_isolated(partial(runner.catch_up, row.slot, token_budget))
            if error is not None:
                yield Output([row], error)
            elif is_ready:
                ready.append(row)
            else:
                token_budget = 0
        yield from self._decode(ready)


def _prompt_output(chunk: Chunk, logits: Tensor | None) -> Output:
    rows = [chunk.sequence] if chunk.is_last else []
    if not rows or chunk.sequence.params.max_new_tokens == 0:
        return Output(rows, None, prompt_tokens=chunk.length)
    assert logits is not None
    return Output(rows, logits, prompt_tokens=chunk.length)


def _read_prompt_logits(sequence: Sequence, chunk: Chunk, logits: Tensor) -> None:
    """Reads the (tokens, vocabulary) logits after each token of the chunk.

    Those that were read before the sequence was preempted are the same and left out.
    """
    start, end = max(chunk.start, sequence.logits_read), chunk.start + chunk.length
    if start >= end:
        return
    logits = logits[start - chunk.start :]
    if sequence.observe is not None:
        sequence.observe(logits)
    if sequence.params.prompt_logprobs:
        if not start:
            sequence.prompt_tokens.append(PromptToken(sequence.prompt[0], None))
        following = sequence.prompt[start + 1 : end + 1]
        found = prompt_logprobs(logits[: len(following)], following, sequence.params.top_n)
        sequence.prompt_tokens.extend(found)
    sequence.logits_read = end
