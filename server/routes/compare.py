"""``POST /compare``: one prompt in several precisions, and each one's divergence from a reference."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import loaders
from loaders.quality.prompt import longest_prompt
from server.errors import DeadlinePassed, PromptTooLong, ServiceError
from server.evaluation.comparison import Compared, Comparison, ComparisonRequest
from server.evaluation.comparison_table import figures, markdown
from server.http.body import read_object
from server.http.route_facts import RouteFacts
from server.http.streaming import until_disconnect
from server.http.validation import validate
from server.routes.generation_request import make_request, merge_parameters
from server.routes.precision_choice import choose_model
from server.routes.schemas import PRECISION_NAMES, NamesOrAll, Sampling
from server.routes.shared import body_of, model_parameter
from server.served_model import ServedModel
from server.service.pool import Pool
from server.service.precision_state import PrecisionState, known_precision
from server.settings.types import ALL
from server.state import state_of

router = APIRouter(tags=["comparing"])


class CompareBody(Sampling):
    """Body of ``POST /compare``; sampling parameters are also accepted inside ``parameters``."""

    inputs: str = Field(min_length=1, examples=["Once upon a time"])
    precisions: NamesOrAll = Field(None, description="the loaded ones if omitted", examples=[["fp32", "nf4"]])
    reference: str = Field("fp32", json_schema_extra={"enum": PRECISION_NAMES})


@dataclass(frozen=True)
class Answer:
    """A comparison's results; with ``"precisions": "all"`` a failed precision has its error."""

    reference: str
    prompt_tokens: int
    seed: int
    rows: dict[str, Compared | ServiceError]


# without precisions, so that it loads nothing
_EXAMPLE = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 20}}
_BODY = body_of(CompareBody, _EXAMPLE, parameters=Sampling.model_json_schema())


@router.post("/compare", openapi_extra=model_parameter(_BODY))
@RouteFacts(takes_a_place=True, media_types=("application/json", "text/markdown"))
async def compare(request: Request) -> Response:
    """Continues a prompt in several precisions, and measures each one's divergence from the reference."""
    values, model = merge_parameters(await read_object(request)), choose_model(request)
    body = validate(CompareBody, values, model.settings)
    comparing = state_of(request.app).comparing
    results = await until_disconnect(request, _within_time(model, body, comparing))
    return answered(request, results)


def answered(request: Request, results: Answer) -> Response:
    """The results as JSON, or as a table in Markdown if the client accepts that."""
    if "text/markdown" in request.headers.get("accept", ""):
        return Response(markdown(results.reference, results.rows), media_type="text/markdown")
    return JSONResponse(_as_json(results))


async def _within_time(model: ServedModel, body: CompareBody, comparing: asyncio.Lock) -> Answer:
    try:
        async with asyncio.timeout(model.settings.request_timeout):
            with model.service.places.reserved():
                return await _compare(model, body, comparing)
    except TimeoutError:
        raise DeadlinePassed("the comparison's time was up") from None


async def _compare(model: ServedModel, body: CompareBody, comparing: asyncio.Lock) -> Answer:
    reference = known_precision(body.reference)
    names = select(model.pool, body.precisions, reference)
    request = await comparison_request(model, body)
    answer = Answer(reference, len(request.ids), request.params.seed, {})
    comparison = Comparison(request, model.codec, model.pool.use, model.service.observe)
    async with comparing:  # one at a time: the reference's logits are kept in memory meanwhile
        for name in names:
            try:
                answer.rows[name] = await comparison.run(name)
            except ServiceError as error:
                if name == reference or body.precisions != ALL:
                    raise
                answer.rows[name] = error
    return answer


def _is_direct(state: PrecisionState) -> bool:
    """Whether loading the precision takes seconds: others make files first."""
    return state.state != "unavailable" and not loaders.is_prepared(state.name)


def select(pool: Pool, precisions: Sequence[str] | None, reference: str) -> list[str]:
    """Canonical names without duplicates, the reference first."""
    if precisions == ALL:
        names = [state.name for state in pool.states() if state.state == "loaded" or _is_direct(state)]
    elif precisions is None:
        names = [state.name for state in pool.states() if state.state == "loaded"]
    else:
        names = [known_precision(name) for name in precisions]
    return list(dict.fromkeys([reference, *names]))


async def comparison_request(model: ServedModel, body: CompareBody) -> ComparisonRequest:
    """What every precision computes; the prompt is encoded here.

    Raises:
        ServiceError
    """
    request = make_request(body.inputs, body, fallback=None, seed=body.seed)
    deadline = time.perf_counter() + model.settings.request_timeout
    ids = await model.service.prompts.encode(request, deadline)
    most = longest_prompt(model.checkpoint.vocabulary)
    if len(ids) > most:
        raise PromptTooLong(f"the prompt has {len(ids)} tokens; a comparison takes at most {most}")
    params = model.service.resolve(request, len(ids))
    return ComparisonRequest(ids, params, request.stop)


def _as_json(answer: Answer) -> dict[str, Any]:
    return {
        "reference": answer.reference,
        "prompt_tokens": answer.prompt_tokens,
        "seed": answer.seed,
        "precisions": {
            name: {"error": row.message, "error_type": row.error_type}
            if isinstance(row, ServiceError)
            else figures(row)
            for name, row in answer.rows.items()
        },
    }
