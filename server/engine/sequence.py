"""The plain data that scheduler, sampler and engine pass between them. Token ids only; no text, no torch."""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import cached_property
from random import Random
from typing import Any, Literal, NamedTuple

MIN_TEMPERATURE = 1e-6  # lower ones overflow float32; the distribution is one token long before that
MIN_LOGPROB = -9999.0
"""Reported for a token of probability 0, as by OpenAI and vLLM: JSON has no infinity."""
FinishReason = Literal["length", "eos_token", "stop_sequence"]
_SEED_BITS = 52
"""Of a random seed: responses contain it, and JavaScript's numbers hold 53 bits."""


def drawn_seed() -> int:
    """A random seed, for a request without one."""
    return secrets.randbits(_SEED_BITS)


@dataclass(frozen=True)
class SamplingParams:
    """How one sequence is sampled. The routes have validated every range."""

    max_new_tokens: int
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    ignore_eos: bool = False
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end the sequence beside the model's own end tokens, also where those are ignored."""
    min_new_tokens: int = 0
    """``withheld`` tokens are not sampled before the sequence has this many."""
    withheld: tuple[int, ...] = ()
    logprobs: bool = False
    """Report each generated token's log-probability under the model's own distribution."""
    top_n: int = 0
    """Report the n most probable tokens with each generated token, and with reported prompt tokens."""
    prompt_logprobs: bool = False
    """Report the prompt's own log-probabilities."""

    # cached: every step reads them for every row

    @cached_property
    def needs_history(self) -> bool:
        """Whether sampling a token depends on the ids before it."""
        penalties = self.repetition_penalty != 1.0 or self.frequency_penalty or self.presence_penalty
        return bool(penalties or self.withheld)

    @cached_property
    def is_plain(self) -> bool:
        """Whether the token is the largest of the unchanged logits."""
        return not (self.do_sample or self.needs_history or self.logit_bias)

    @cached_property
    def reports(self) -> bool:
        """Whether its tokens have log-probabilities."""
        return bool(self.logprobs or self.top_n)


class TokenLogprob(NamedTuple):
    """A token and its log-probability; None for a prompt's first token, which has no context."""

    id: int
    logprob: float | None


class Token(NamedTuple):  # a frozen dataclass takes five times as long to make
    """One generated token."""

    id: int
    logprob: float | None = None
    top: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    """Set on a sequence's last token. ``stop_sequence``: one of ``stop_ids``; strings are found later."""


class PromptToken(NamedTuple):
    """One prompt token, its log-probability given those before it, and the most probable tokens there."""

    id: int
    logprob: float | None
    top: tuple[TokenLogprob, ...] = ()


@dataclass
class Timeline:
    """Times of a sequence's events, in ``time.perf_counter()`` seconds; None: not yet."""

    arrived: float = field(default_factory=time.perf_counter)
    admitted: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    tokens: int = 0

    @property
    def queue_seconds(self) -> float:
        return (self.admitted or time.perf_counter()) - self.arrived

    @property
    def prefill_seconds(self) -> float:
        """From admission to the first token."""
        if self.admitted is None:
            return 0.0
        return (self.first_token or time.perf_counter()) - self.admitted

    @property
    def decode_seconds(self) -> float:
        """From the first token to the last."""
        if self.first_token is None or self.last_token is None:
            return 0.0
        return self.last_token - self.first_token

    @property
    def total_seconds(self) -> float:
        return (self.last_token or time.perf_counter()) - self.arrived

    def elapsed(self) -> float:
        """From arrival to now, in seconds."""
        return time.perf_counter() - self.arrived


class Status(Enum):
    """A sequence's stage in the scheduler, which alone changes it."""

    WAITING = auto()
    RUNNING = auto()
    """Holds a KV slot."""
    FINISHED = auto()
    """Has all its tokens, was cancelled, passed its deadline or failed."""


@dataclass(eq=False)
class Sequence:
    """A prompt and its continuation in one engine. Owned by the worker thread."""

    prompt: list[int]
    params: SamplingParams
    deadline: float | None = None
    """``time.perf_counter()`` seconds after which it expires."""
    status: Status = Status.WAITING
    slot: int = -1
    """The KV slot, from the moment it is running."""
    prefilled: int = 0
    """Tokens of ``prefill_ids`` in the KV slot."""
    recomputed: int = 0
    """Generated tokens that are computed again with the prompt, since the sequence was preempted."""
    preemptions: int = 0
    attached: int = 0
    """Of ``prefilled``, tokens that came from the cache of prefixes."""
    cached_tokens: int = 0
    """Prompt tokens that were cached when the sequence was first admitted."""
    logits_read: int = 0
    """Prompt tokens whose logits were read, where ``needs_all_logits``."""
    generated: list[int] = field(default_factory=list)
    prompt_tokens: list[PromptToken] = field(default_factory=list)
    cancelled: bool = False
    observe: Callable[[Any], None] | None = None
    """Is called on the worker's thread with the (tokens, vocabulary) logits of each prompt chunk, in order.
    They are valid during the call; an exception ends the sequence."""
    owner: str | None = None
    """Finds cached prefixes of this owner's prompts alone; None: none is looked for, and none kept."""
    chunk: int | None = None
    """Most prompt tokens computed in a step, for work in the background; None: the scheduler's budget."""
    timeline: Timeline = field(default_factory=Timeline)
    bias: Any = field(default=None, init=False, repr=False)
    """``logit_bias`` as tensors, cached by the sampler."""
    random: Random = field(init=False, repr=False)
    """Its own random stream: draws depend on its seed alone, not on other sequences."""

    def __post_init__(self) -> None:
        self.random = Random(self.params.seed)

    @property
    def withheld(self) -> tuple[int, ...]:
        """Tokens that are excluded from the next sampling."""
        return self.params.withheld if len(self.generated) < self.params.min_new_tokens else ()

    @property
    def prefill_ids(self) -> list[int]:
        """The prompt; after a preemption, with the tokens that were generated before it."""
        return [*self.prompt, *self.generated[: self.recomputed]] if self.recomputed else self.prompt

    @property
    def remaining_prompt(self) -> int:
        """Tokens of ``prefill_ids`` to be computed."""
        return len(self.prompt) + self.recomputed - self.prefilled

    @property
    def needs_all_logits(self) -> bool:
        """Whether logits of prompt tokens, not of the last alone, are still to be read."""
        reads = self.params.prompt_logprobs or self.observe is not None
        return reads and self.logits_read < len(self.prompt)

    def preempt(self) -> None:
        """Back to waiting: everything so far is computed again, and generation goes on from there."""
        self.status, self.slot = Status.WAITING, -1
        self.prefilled = self.attached = 0
        self.recomputed = len(self.generated)
        self.preemptions += 1


class StepStats(NamedTuple):
    """Figures of one step of an engine."""

    batch: int
    """Rows decoded together."""
    prompt_tokens: int
    generated_tokens: int
    seconds: float
    gaps: tuple[float, ...] = ()
    """Seconds between each decoded row's token and the row's token before."""
