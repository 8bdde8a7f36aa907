"""Builds ``GenerationRequest`` from a validated body of either dialect."""

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
"""Bound of the repetition penalty: larger ones change no choice, and overflow float32 into NaN."""


def merge_parameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """The native body with ``parameters`` merged into it and ``prompt`` renamed to ``inputs``.

    Raises:
        Invalid: ``parameters`` is no object or names a field that it can't hold, or a field is given twice.
    """
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
    sampling: Sampling,
    *,
    requested: PrecisionChoice = _DEFAULT,
    fallback: bool | None,
    seed: int | None,
    logprobs: bool = False,
    top_n: int = 0,
    prompt_logprobs: bool = False,
    more: OpenAIBody | None = None,
) -> GenerationRequest:
    """The request of one sequence.

    Args:
        sampling: what both dialects can set.
        more: the body of the OpenAI dialect, which can set more.
    """
    length_parameter = "max_new_tokens" if sampling.max_new_tokens is not None else None
    params = SamplingParams(
        max_new_tokens=1,  # placeholder: the service sets the length and the seed
        do_sample=sampling.samples,
        temperature=sampling.temperature or 1.0,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        typical_p=sampling.typical_p,
        min_p=sampling.min_p,
        repetition_penalty=min(max(sampling.repetition_penalty or 1.0, 1 / _STRONGEST), _STRONGEST),
        frequency_penalty=sampling.frequency_penalty or 0.0,
        presence_penalty=sampling.presence_penalty or 0.0,
        logit_bias=more.bias if more else (),
        ignore_eos=bool(sampling.ignore_eos),
        stop_ids=frozenset((more and more.stop_token_ids) or ()),
        min_new_tokens=(more and more.min_tokens) or 0,
        logprobs=logprobs,
        top_n=top_n,
        prompt_logprobs=prompt_logprobs,
    )
    return GenerationRequest(
        prompt,
        params,
        requested.precision,
        bool(fallback),
        tuple(sampling.stop or ()),
        sampling.truncate,
        sampling.max_new_tokens,
        more.length_parameter if more else length_parameter,
        seed,
        requested.choice,
    )
