"""From a validated body to what the service is asked: one way for both dialects."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request

import loaders
from loaders.base import LoaderError
from server.engine.sequence import SamplingParams
from server.errors import BadPrecision, Invalid, UnknownModel
from server.http.validation import printable
from server.report.auto import bounds_of, choose_by_report
from server.report.choice import Bounds, Choice
from server.routes.openai.schemas import OpenAIBody
from server.routes.schemas import AutoBounds, Sampling
from server.service.generation import Conversation, GenerationRequest
from server.settings.types import AUTO

ANY_MODEL = "tgi"
_ANY_MODEL = (ANY_MODEL, "dummy", "[UNUSED]")
"""What Hugging Face's clients and their documentation call the served model when only an address is known."""

_STRONGEST = 1e20
"""Repetition penalty: it has long decided everything, and beyond it float32 overflows into no numbers."""


@dataclass(frozen=True)
class Asked:
    """The precision that a request gets, None for the default; and why, where the server chose it."""

    precision: str | None = None
    choice: Choice | None = None


_DEFAULT = Asked()


def model_names(model_id: str) -> tuple[str, ...]:
    """Names the served model answers to: as configured, and without its owner."""
    return model_id, model_id.rsplit("/", 1)[-1]


def precision_of_model(name: str | None, model_id: str) -> str | None:
    """The precision a model name asks for: ``gpt2:int8`` → ``int8``, ``gpt2`` → None.

    Raises:
        UnknownModel: not the served model.
    """
    if name is None or name in _ANY_MODEL or name in model_names(model_id):
        return None
    base, colon, precision = name.rpartition(":")
    if not colon or base not in (*model_names(model_id), *_ANY_MODEL):
        raise UnknownModel(f"no such model here; this server has {model_id}", param="model")
    return precision


def choose_precision(request: Request, body: Mapping[str, Any], model: str | None = None) -> str | None:
    """The precision asked for, perhaps ``AUTO``; None where nothing asks for one.

    It may stand in the body, the header, the query and the model's name (in the path or ``model``).

    Raises:
        BadPrecision: no such precision, or two places disagree.
        UnknownModel: the name is not the served model's.
    """
    model_id = request.app.state.checkpoint.model_id
    names = [name for name in (request.path_params.get("model"), model) if name is not None]
    names = [name for name in names if not _is_address(name, request)]
    asked: list[object] = [body["precision"]] if "precision" in body else []
    asked += request.headers.getlist("x-precision") + request.query_params.getlist("precision")
    asked += [found for name in names if (found := precision_of_model(name, model_id)) is not None]
    chosen = {name if name == AUTO else known_precision(name): None for name in asked}
    if len(chosen) > 1:
        raise BadPrecision(f"the request names different precisions: {', '.join(chosen)}")
    return next(iter(chosen), None)


def _is_address(name: str, request: Request) -> bool:
    """Whether a model's name is this server's own address, as ``@huggingface/inference`` sends it."""
    with suppress(ValueError):
        address = urlsplit(name)
        host = request.headers.get("host", "")
        return address.scheme in ("http", "https") and address.netloc.lower() == host.lower() != ""
    return False


def settle(request: Request, name: str | None, wish: AutoBounds | None) -> Asked:
    """What a request gets that asked for ``name``, with bounds of its own or those of the server.

    Raises:
        Invalid: bounds beside the name of a precision; or none keeps to them.
        Unavailable: there is no report to choose by.
    """
    state = request.app.state
    if name not in (None, AUTO) and wish is not None:
        raise Invalid('auto goes with precision "auto", not with a named one', param="auto")
    if name is None and wish is None:
        return Asked(None, state.default_choice)
    if name not in (None, AUTO):
        return Asked(name)
    bounds = bounds_of(state.settings) if wish is None else Bounds(**wish.model_dump())
    choice = choose_by_report(state.reports, state.pool.able, bounds)
    return Asked(choice.precision, choice)


def known_precision(name: object) -> str:
    if name == AUTO:
        raise BadPrecision("precision 'auto' is not offered here; name one")
    try:
        return loaders.canonical(name)
    except LoaderError as error:
        raise BadPrecision(str(error).encode("ascii", "backslashreplace").decode()) from None


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
    asked: Asked = _DEFAULT,
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
