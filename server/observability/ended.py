"""A generation that has ended, and the interface of what counts and traces it."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from server.engine.sequence import FinishReason, SamplingParams, Timeline

Operation = Literal["chat", "text_completion"]
"""OpenTelemetry's names of what a generative model is asked for."""


@dataclass(slots=True, kw_only=True)
class Ended:
    """One generation of a request, or the request that was refused before it became one."""

    precision: str
    outcome: str
    """``success``, ``cancelled`` or an error's ``outcome``."""
    operation: Operation = "text_completion"
    timeline: Timeline = field(default_factory=Timeline)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    finish: FinishReason | None = None
    params: SamplingParams | None = None
    """None: refused before anything was computed."""
    stream: bool = False
    response_id: str | None = None
    """The id in the response's body, in the dialects that have one."""

    @property
    def failed(self) -> bool:
        return self.outcome not in ("success", "cancelled")


class SpanIds(NamedTuple):
    """The ids of an exported span, in hexadecimal."""

    trace_id: str
    span_id: str


class Observer(Protocol):
    """Implemented by ``Metrics``, and by ``Tracing`` around it."""

    def observe_request(self, ended: Ended, span: SpanIds | None = None) -> None:
        """Counts a generation; ``span``: the one that it was traced as."""
