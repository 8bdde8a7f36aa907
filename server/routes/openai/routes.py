"""Routes of the OpenAI dialect: models, completions, chat."""

from contextlib import suppress
from dataclasses import replace
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Path
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.errors import BadPrecision, BadRequest, NotFound, UnknownModel
from server.http.body import read_object
from server.http.route_facts import Dialect, RouteFacts
from server.http.validation import validate
from server.routes.openai.chat import Chat
from server.routes.openai.completions import Completion
from server.routes.openai.schemas import ChatBody, CompletionBody, OpenAIBody
from server.routes.precision_choice import (
    ANY_MODEL,
    choose_precision,
    model_of,
    resolve_precision,
    split_model_name,
)
from server.routes.shared import body_of, precision_parameters
from server.service.precision_state import known_precision
from server.service.text.prompt_encoder import NO_TEMPLATE
from server.state import state_of

router = APIRouter(tags=["openai"])
Body = TypeVar("Body", bound=OpenAIBody)
_COMPLETION = body_of(CompletionBody, {"prompt": "Once upon a time", "max_tokens": 20, "temperature": 0})
_CHAT = body_of(
    ChatBody, {"messages": [{"role": "user", "content": "Tell me a story."}], "max_completion_tokens": 20}
)

_COMPLETED = {
    "id": "cmpl-237753b28693441c896d53410ef75a4e",
    "object": "text_completion",
    "created": 1795489372,
    "model": "bundled:nf4",
    "choices": [{"index": 0, "text": "s are not a", "logprobs": None, "finish_reason": "length"}],
    "precision": "nf4",
    "precision_requested": "nf4",
    "fallback_reason": None,
    "usage": {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 0},
    },
}
_MODELS = RouteFacts(dialect=Dialect.OPENAI)
_GENERATES = RouteFacts(
    takes_a_place=True,
    generates=True,
    dialect=Dialect.OPENAI,
    media_types=("application/json", "text/event-stream"),
)


@router.get("/v1/models")
@router.get("/models/{model:path}/v1/models", openapi_extra=precision_parameters({}, named=True))
@_MODELS
async def models(request: Request) -> Response:
    """The served models, and one entry for each of their precisions that this host can run."""
    choose_precision(request, {})
    return JSONResponse({"object": "list", "data": list(_models(request).values())})


@router.get("/v1/models/{id:path}")
@_MODELS
async def model(
    request: Request, id: Annotated[str, Path(openapi_examples={ANY_MODEL: {"value": ANY_MODEL}})]
) -> Response:
    """One entry of the list of models."""
    found = _models(request).get(_entry(id, request))
    if found is None:
        raise UnknownModel("no such model here", param="model")
    return JSONResponse(found)


def _entry(name: str, request: Request) -> str:
    """The id in the list of models that an accepted model name refers to; other names as they are."""
    state = state_of(request.app)
    model, precision = split_model_name(name, state.models)
    full = model or state.default.name
    with suppress(BadPrecision):
        return full if precision is None else f"{full}:{known_precision(precision)}"
    return name


def _models(request: Request) -> dict[str, dict[str, Any]]:
    state = state_of(request.app)
    ids: dict[str, str] = {}
    for name, model in state.models.items():
        able = [known.name for known in model.pool.states() if known.state != "unavailable"]
        ids |= {name: model.pool.default, **{f"{name}:{precision}": precision for precision in able}}
    created = int(state.started)
    return {
        id_: {"id": id_, "object": "model", "created": created, "owned_by": "bitdial", "precision": precision}
        for id_, precision in ids.items()
    }


@router.post("/v1/completions", openapi_extra=precision_parameters(_COMPLETION))
@router.post(
    "/models/{model:path}/v1/completions", openapi_extra=precision_parameters(_COMPLETION, named=True)
)
@replace(_GENERATES, example=_COMPLETED)
async def completions(request: Request) -> Response:
    """Continues one or several prompts."""
    values = await read_object(request)
    precision = choose_precision(request, values, values.get("model"))
    body = _validated(request, CompletionBody, values)
    return await Completion(request, body, resolve_precision(request, precision, body.auto)).answer()


@router.post("/v1/chat/completions", openapi_extra=precision_parameters(_CHAT))
@router.post(
    "/models/{model:path}/v1/chat/completions", openapi_extra=precision_parameters(_CHAT, named=True)
)
@replace(_GENERATES, dialect=Dialect.OPENAI_CHAT)
async def chat(request: Request) -> Response:
    """Continues a conversation, if the model has a chat template."""
    values = await read_object(request)
    precision = choose_precision(request, values, values.get("model"))
    if model_of(request).chat is None:
        raise BadRequest(NO_TEMPLATE, param="messages")
    body = _validated(request, ChatBody, values)
    return await Chat(request, body, resolve_precision(request, precision, body.auto)).answer()


@router.post("/models/{model:path}/v1/{rest:path}", include_in_schema=False)
@_GENERATES
async def unknown_route(request: Request) -> Response:
    """Without it, ``/models/{model}`` would answer 404 for a model of that name, in the native dialect."""
    raise NotFound("no such route here")


def _validated(request: Request, schema: type[Body], values: dict[str, Any]) -> Body:
    model = model_of(request)
    return validate(schema, values, model.settings, model.checkpoint.vocabulary)
