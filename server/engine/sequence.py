"""The plain data that scheduler, sampler and engine pass between them. Token ids only; no text, no torch."""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import cached_property
from random import Random
from typing import Any, Literal, NamedTuple

COLDEST = 1e-6  # temperatures below it overflow float32; the distribution is a single token long before
LEAST_LOGPROB = -9999.0
"""Of a token that the model rules out, as OpenAI and vLLM have it: JSON has no infinity."""
FinishReason = Literal["length", "eos_token", "stop_sequence"]
_DRAWN_BITS = 52
"""Of a seed that nobody gave: it is told to clients, and JavaScript's numbers hold 53 bits."""


def drawn_seed() -> int:
    """For a request that brings none."""
    return secrets.randbits(_DRAWN_BITS)


@dataclass(frozen=True)
class SamplingParams:
    """How one sequence is continued. The routes have validated every range."""

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
    """``withheld`` tokens are not picked before so many others."""
    withheld: tuple[int, ...] = ()
    logprobs: bool = False
    """Report each generated token's log-probability under the model's own distribution."""
    top_n: int = 0
    """Report the n most probable tokens beside each generated token, and beside the prompt's if asked for."""
    prompt_logprobs: bool = False
    """Report the prompt's own log-probabilities."""

    # asked at every step, of every row

    @cached_property
    def needs_history(self) -> bool:
        """Whether picking a token needs those before it, which the model has looked at already."""
        penalties = self.repetition_penalty != 1.0 or self.frequency_penalty or self.presence_penalty
        return bool(penalties or self.withheld)

    @cached_property
    def is_plain(self) -> bool:
        """Whether the largest logit is taken as it is."""
        return not (self.do_sample or self.needs_history or self.logit_bias)

    @cached_property
    def reports(self) -> bool:
        """Whether log-probabilities are told with its tokens."""
        return bool(self.logprobs or self.top_n)


class TokenLogprob(NamedTuple):
    """A token and its log-probability; None for the first of a prompt, which nothing predicts."""

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
    """One prompt token, its log-probability given those before it, and the alternatives at its place."""

    id: int
    logprob: float | None
    top: tuple[TokenLogprob, ...] = ()


@dataclass
class Timeline:
    """When things happened to a sequence: ``time.perf_counter()`` seconds; None: not yet."""

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


class Status(Enum):
    """A sequence's stage in the scheduler, which alone changes it."""

    WAITING = auto()
    RUNNING = auto()
    """Holds a KV slot."""
    FINISHED = auto()
    """Has all its tokens, was cancelled, passed its deadline or failed."""


@dataclass(eq=False)
class Sequence:
    """A prompt and its continuation on their way through one engine. Owned by the worker thread."""

    prompt: list[int]
    params: SamplingParams
    deadline: float | None = None
    """``time.perf_counter()`` seconds after which it is given up."""
    status: Status = Status.WAITING
    slot: int = -1
    """The KV slot, from the moment it is running."""
    prefilled: int = 0
    """Prompt tokens already in the KV slot."""
    generated: list[int] = field(default_factory=list)
    prompt_tokens: list[PromptToken] = field(default_factory=list)
    cancelled: bool = False
    observe: Callable[[Any], None] | None = None
    """Told, on the worker's thread, the (tokens, vocabulary) logits of each chunk of the prompt, in order.
    They are valid during the call; what it raises ends the sequence."""
    chunk: int | None = None
    """Most tokens of its prompt computed in a step, for work that must delay nobody; None: as usual."""
    timeline: Timeline = field(default_factory=Timeline)
    bias: Any = field(default=None, init=False, repr=False)
    """The sampler's note of ``logit_bias`` in the form that it needs."""
    random: Random = field(init=False, repr=False)
    """Its own random stream: what it draws depends on its seed and on nothing else that runs."""

    def __post_init__(self) -> None:
        self.random = Random(self.params.seed)

    @property
    def withheld(self) -> tuple[int, ...]:
        """Tokens that can't be its next one."""
        return self.params.withheld if len(self.generated) < self.params.min_new_tokens else ()

    @property
    def remaining_prompt(self) -> int:
        return len(self.prompt) - self.prefilled


class StepStats(NamedTuple):
    """What one step of an engine did."""

    batch: int
    """Rows decoded together."""
    prompt_tokens: int
    generated_tokens: int
    seconds: float
    gaps: tuple[float, ...] = ()
    """Seconds between each decoded row's token and the row's token before."""
