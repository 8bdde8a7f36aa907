"""A generation in the words of OpenTelemetry's conventions for generative AI, v0.1.0; none of its text.

https://github.com/open-telemetry/semantic-conventions-genai/blob/v0.1.0/docs/gen-ai/client-inference.md
"""

from collections.abc import Iterator
from typing import NamedTuple

from opentelemetry.util.types import AttributeValue

from server.engine.sequence import SamplingParams
from server.observability.ended import Ended
from server.observability.latency import PROVIDER

Attributes = dict[str, AttributeValue]


class Phase(NamedTuple):
    """A part of a generation, between two ``time.perf_counter()`` values."""

    name: str
    began: float
    ended: float
    attributes: Attributes


def span_name(ended: Ended, model: str) -> str:
    return f"{ended.operation} {model}"


def identity(ended: Ended, model: str) -> Attributes:
    """The attributes that a sampler may decide by."""
    return {
        "gen_ai.operation.name": ended.operation,
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": model,
        "bitdial.precision": ended.precision,
    }


def details(ended: Ended, model: str) -> Attributes:
    """The attributes of a generation, or of its refusal."""
    out: Attributes = {"bitdial.outcome": ended.outcome}
    if ended.failed:
        out["error.type"] = ended.outcome
    if ended.params is None:
        return out
    out |= _request(ended, ended.params)
    out |= {
        "gen_ai.response.model": model,
        "gen_ai.usage.input_tokens": ended.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": ended.cached_tokens,
        "gen_ai.usage.output_tokens": ended.timeline.tokens,
    }
    if ended.finish is not None:
        out["gen_ai.response.finish_reasons"] = ("length" if ended.finish == "length" else "stop",)
    if ended.response_id is not None:
        out["gen_ai.response.id"] = ended.response_id
    if ended.stream and ended.timeline.first_token is not None:
        first = ended.timeline.first_token - ended.timeline.arrived
        out["gen_ai.response.time_to_first_chunk"] = first
    return out


def _request(ended: Ended, params: SamplingParams) -> Attributes:
    out: Attributes = {
        "gen_ai.request.max_tokens": params.max_new_tokens,
        "gen_ai.request.temperature": params.temperature if params.do_sample else 0.0,
    }
    if params.do_sample:  # otherwise these change nothing
        out["gen_ai.request.seed"] = params.seed
        if params.top_p is not None:
            out["gen_ai.request.top_p"] = params.top_p
        if params.top_k is not None:
            out["gen_ai.request.top_k"] = params.top_k
    if params.frequency_penalty:
        out["gen_ai.request.frequency_penalty"] = params.frequency_penalty
    if params.presence_penalty:
        out["gen_ai.request.presence_penalty"] = params.presence_penalty
    if ended.stream:
        out["gen_ai.request.stream"] = True
    return out


def phases(ended: Ended, end: float) -> Iterator[Phase]:
    """The phases that the generation reached; the last one lasts to its end, at ``end``."""
    line = ended.timeline
    if ended.params is None:
        return
    yield Phase("queue", line.arrived, line.admitted or end, {})
    if line.admitted is None:
        return
    computed = ended.prompt_tokens - ended.cached_tokens
    prompt: Attributes = {
        "bitdial.computed_tokens": computed, "bitdial.cached_tokens": ended.cached_tokens
    }  # fmt: skip
    yield Phase("prefill", line.admitted, line.first_token or end, prompt)
    if line.first_token is not None:
        generated: Attributes = {
            "bitdial.generated_tokens": line.tokens, "bitdial.preemptions": ended.preemptions
        }  # fmt: skip
        yield Phase("decode", line.first_token, end, generated)
