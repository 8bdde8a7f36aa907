"""What the engine's thread does in one step: admit, prefill, decode, sample; faults stay with their row."""

import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from loaders.runner import DeviceRunner, LengthRunner, MixedRunner, Runner
from server.engine.fair_lock import FairLock
from server.engine.faults import as_service_error, run_isolated
from server.engine.overlap import Overlap
from server.engine.sampler import Sampler, prompt_logprobs
from server.engine.scheduler import Chunk, Scheduler
from server.engine.sequence import PromptToken, SamplingParams, Sequence, StepStats, Token
from server.errors import DeadlinePassed, ServiceError

Event = tuple[Sequence, Token | ServiceError | None]
"""A sequence, and what its reader is to be told: a token, an error, or (None) the end without one."""


@dataclass
class Step:
    """What one step brought about."""

    events: list[Event] = field(default_factory=list)
    generated: int = 0
    stats: StepStats | None = None
    gaps: list[float] = field(default_factory=list)


class Worker:
    """Runs on one thread; the engine calls it there."""

    def __init__(
        self, runner: Runner, scheduler: Scheduler, sampler: Sampler, turn: FairLock | None = None
    ) -> None:
        self._runner, self._scheduler, self._sampler = runner, scheduler, sampler
        self._turn = turn or nullcontext()
        self._ahead = Overlap(runner, sampler) if isinstance(runner, DeviceRunner) else None
        self._mixed = runner if isinstance(runner, MixedRunner) else None
        self._by_length = runner if isinstance(runner, LengthRunner) else None
        self.busy_since: float | None = None
        """When the step under way began, its wait for a turn included; None between steps."""
        self.longest_step = 0.0

    def warm_up(self) -> None:
        """One prefill and one decode: kernels are chosen and memory is taken now, not by a request."""
        with self._turn:
            self._runner.prefill(0, [0, 0])
            logits = self._runner.decode([0], [0])
            if logits.is_cuda:  # each kernel is loaded onto the device at its first use
                params = SamplingParams(2, do_sample=True, top_k=2, top_p=0.5, typical_p=0.5, top_n=1)
                self._sampler.pick(logits, [Sequence([0, 0], params)])
            self._runner.free(0)

    def close(self) -> None:
        self._ahead = None  # it holds tensors of the device
        self._runner.close()

    def step(self, now: float) -> Step:
        """Advances every admitted sequence by a prompt chunk or a token."""
        step = Step()
        self._drop_unwanted(step, now)
        self._scheduler.admit(now)
        if not self._scheduler.running:
            return step
        self.busy_since = begun = time.perf_counter()
        with self._turn:
            started = time.perf_counter()
            prompt_tokens, batch = self._advance(step)
        ended = time.perf_counter()
        self.busy_since = None
        self.longest_step = max(self.longest_step, ended - begun)
        step.stats = StepStats(batch, prompt_tokens, step.generated, ended - started, tuple(step.gaps))
        return step

    def _drop_unwanted(self, step: Step, now: float) -> None:
        for sequence in self._scheduler.unwanted(now):
            late = None if sequence.cancelled else DeadlinePassed("the request's time was up")
            self._end(step, sequence, late)

    def _advance(self, step: Step) -> tuple[int, int]:
        """How many prompt tokens and how many rows were computed."""
        chunks, rows = self._scheduler.chunks(), self._scheduler.decodable()
        if chunks and rows and self._advance_together(step, chunks[0], rows):
            return chunks[0].count + self._prefill(step, chunks[1:]), len(rows)
        return self._prefill(step, chunks), self._decode(step, rows)

    def _advance_together(self, step: Step, chunk: Chunk, rows: list[Sequence]) -> bool:
        """A prompt chunk and the running rows in one pass over the weights; whether that could be done."""
        runner, sequence, is_last = self._mixed, chunk.sequence, chunk.is_last
        if runner is None or _wants_all(sequence) or sequence.slot is None:
            return False
        ids = sequence.prompt[sequence.prefilled : sequence.prefilled + chunk.count]
        slots = [row.slot for row in rows if row.slot is not None]
        last = [row.generated[-1] for row in rows]
        logits, _ = run_isolated(partial(runner.advance, sequence.slot, ids, slots, last))
        if logits is None:  # somebody is at fault: each by itself then
            return False
        sequence.prefilled += chunk.count
        if is_last:
            self._prompt_done(step, sequence, logits[:1])
        self._sample(step, rows, logits[1:])
        return True

    def _prefill(self, step: Step, chunks: list[Chunk]) -> int:
        done = 0
        for chunk in chunks:
            is_last = chunk.is_last
            logits, fault = run_isolated(partial(self._prefill_chunk, chunk))
            if fault is not None:
                self._end(step, chunk.sequence, fault)
                continue
            done += chunk.count
            if is_last:
                self._prompt_done(step, chunk.sequence, logits)
        return done

    def _prefill_chunk(self, chunk: Chunk) -> Tensor | None:
        """The logits after the prompt's last token, once it is reached."""
        sequence, start = chunk.sequence, chunk.sequence.prefilled
        ids = sequence.prompt[start : start + chunk.count]
        assert sequence.slot is not None
        if self._by_length is not None and not start:
            self._by_length.expect(sequence.slot, len(sequence.prompt))
        wanted = "all" if _wants_all(sequence) else "last" if chunk.is_last else "none"
        logits = self._runner.prefill(sequence.slot, ids, wanted)  # type: ignore[arg-type]
        if sequence.observe is not None:
            sequence.observe(logits)
        if sequence.params.prompt_logprobs and logits is not None:
            if not start:
                sequence.prompt_tokens.append(PromptToken(ids[0], None))
            following = sequence.prompt[start + 1 : start + chunk.count + 1]
            found = prompt_logprobs(logits[: len(following)], following, sequence.params.top_n)
            sequence.prompt_tokens.extend(found)
        sequence.prefilled += chunk.count
        return logits[-1:] if logits is not None else None

    def _prompt_done(self, step: Step, sequence: Sequence, logits: Tensor | None) -> None:
        if sequence.params.max_new_tokens == 0:
            sequence.timeline.first_token = sequence.timeline.last_token = time.perf_counter()
            self._end(step, sequence, None)
        else:
            assert logits is not None
            self._sample(step, [sequence], logits)

    def _decode(self, step: Step, rows: list[Sequence]) -> int:
        if self._ahead is not None:
            return self._decode_ahead(self._ahead, step, rows)
        return self._decode_now(step, self._caught_up(step, rows))

    def _caught_up(self, step: Step, rows: list[Sequence]) -> list[Sequence]:
        """The rows that can go on; of the first other one, a part is computed again."""
        runner = self._by_length
        if runner is None:
            return rows
        ready, budget = [], self._scheduler.budget
        for row in rows:
            assert row.slot is not None
            can_go_on, fault = run_isolated(partial(runner.catch_up, row.slot, budget))
            if fault is not None:
                self._end(step, row, fault)
            elif can_go_on:
                ready.append(row)
            else:
                budget = 0
        return ready

    def _decode_ahead(self, ahead: Overlap, step: Step, rows: list[Sequence]) -> int:
        """Launches the rows' next step, then reads the tokens of the one before."""
        before = ahead.take()
        going = ahead.continuing_rows(rows, before)
        _, fault = run_isolated(partial(ahead.launch, going, before)) if going else (None, None)
        if before is not None:
            self._take(step, before.rows, before.picks.wait())
        if going and fault is None:
            ahead.drop_if_idle()
            return len(going)
        # somebody must be seen first, or is at fault
        return self._decode_now(step, [row for row in rows if row.slot is not None])

    def _decode_now(self, step: Step, rows: list[Sequence]) -> int:
        if rows:
            logits, fault = run_isolated(partial(self._forward, rows))
            if logits is not None:
                self._sample(step, rows, logits)
            elif len(rows) == 1:
                self._end(step, rows[0], fault)
            else:
                self._decode_one_by_one(step, rows)
        return len(rows)

    def _decode_one_by_one(self, step: Step, rows: list[Sequence]) -> None:
        """The batch failed: each row alone, so that only those at fault are lost."""
        for row in rows:
            logits, fault = run_isolated(partial(self._forward, [row]))
            if logits is not None:
                self._sample(step, [row], logits)
            else:
                self._end(step, row, fault)

    def _forward(self, rows: list[Sequence]) -> Tensor:
        slots = [row.slot for row in rows if row.slot is not None]
        return self._runner.decode(slots, [row.generated[-1] for row in rows])

    def _sample(self, step: Step, rows: list[Sequence], logits: Tensor) -> None:
        self._take(step, rows, self._sampler.pick(logits, rows))

    def _take(self, step: Step, rows: list[Sequence], picked: list[Token | Exception]) -> None:
        now = time.perf_counter()
        tell, gap = step.events.append, step.gaps.append
        for row, item in zip(rows, picked, strict=True):
            if row.slot is None:
                continue  # it ended while this token was under way
            if isinstance(item, Exception):
                self._end(step, row, as_service_error(item))
                continue
            row.generated.append(item.id)
            timeline = row.timeline
            if timeline.last_token is None:
                timeline.first_token = now
            else:
                gap(now - timeline.last_token)
            timeline.last_token = now
            timeline.tokens += 1
            step.generated += 1
            if item.finish is not None:
                self._release(row)
            tell((row, item))

    def _end(self, step: Step, sequence: Sequence, item: ServiceError | None) -> None:
        self._release(sequence)
        step.events.append((sequence, item))

    def _release(self, sequence: Sequence) -> None:
        slot = self._scheduler.remove(sequence)
        if slot is not None:
            self._runner.free(slot)


def _wants_all(sequence: Sequence) -> bool:
    """Whether somebody looks at the logits of every prompt token."""
    return sequence.params.prompt_logprobs or sequence.observe is not None
