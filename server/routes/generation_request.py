"""From a validated body to what the service is asked: one way for both dialects."""

from collections.abc import Mapping
from typing import Any

from server.engine.sequence import SamplingParams
from server.errors import Invalid
from server.http.validation import printable
from server.routes.openai.schemas import OpenAIBody
from server.routes.precision_choice import _DEFAULT, PrecisionChoice
from server.routes.schemas import Sampling
from server.service.generation import Conversation, GenerationRequest

_STRONGEST = 1e20
"""Repetition penalty: it has long decided everything, and beyond it float32 overflows into no numbers."""


def merge_parameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """The native body with ``parameters`` spread out and ``prompt`` renamed to ``inputs``."""
    flat = dict(values)
    parameters = {} if (given := flat.pop("parameters", None)) is None else given
    if not isinstance(parameters, dict):
        raise Invalid("parameters must be an object", param="parameters")
    for name, value in parameters.items():
        if name in ("inputs", "prompt", "stream", "parameters"):
            raise Invalid(f"{name} does not belong in parameters", param="parameters")
        if name in flat:
            shown = printable(name)
            raise Invalid(f"{shown} is given twice: at the top level and in parameters", param=shown)
        flat[name] = value
    if "prompt" in flat:
        if "inputs" in flat:
            raise Invalid("give either inputs or prompt, not both", param="prompt")
        flat["inputs"] = flat.pop("prompt")
    return flat


def make_request(
    prompt: str | list[int] | Conversation,
    wishes: Sampling,
    *,
    asked: PrecisionChoice = _DEFAULT,
    fallback: bool | None,
    seed: int | None,
    logprobs: bool = False,
    top_n: int = 0,
    prompt_logprobs: bool = False,
    more: OpenAIBody | None = None,
) -> GenerationRequest:
    """One sequence's request; ``more``: the body of the dialect that can ask for more than ``wishes`` say."""
    length_parameter = "max_new_tokens" if wishes.max_new_tokens is not None else None
    params = SamplingParams(
        max_new_tokens=1,  # settled by the service, as the seed is
        do_sample=wishes.samples,
        temperature=wishes.temperature or 1.0,
        top_k=wishes.top_k,
        top_p=wishes.top_p,
        typical_p=wishes.typical_p,
        min_p=wishes.min_p,
        repetition_penalty=min(max(wishes.repetition_penalty or 1.0, 1 / _STRONGEST), _STRONGEST),
        frequency_penalty=wishes.frequency_penalty or 0.0,
        presence_penalty=wishes.presence_penalty or 0.0,
        logit_bias=more.bias if more else (),
        ignore_eos=bool(wishes.ignore_eos),
        stop_ids=frozenset((more and more.stop_token_ids) or ()),
        min_new_tokens=(more and more.min_tokens) or 0,
        logprobs=logprobs,
        top_n=top_n,
        prompt_logprobs=prompt_logprobs,
    )
    return GenerationRequest(
        prompt,
        params,
        asked.precision,
        bool(fallback),
        tuple(wishes.stop or ()),
        wishes.truncate,
        wishes.max_new_tokens,
        more.length_parameter if more else length_parameter,
        seed,
        asked.choice,
    )
