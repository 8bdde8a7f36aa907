"""Shared by the generating routes: running and streaming, response headers, bodies in the API document."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.concurrency import cancelled
from server.http.auth import owner_of
from server.http.streaming import EventStream, Stream, until_disconnect
from server.routes.precision_choice import ANY_MODEL, model_of
from server.routes.schemas import PRECISION_NAMES
from server.service.generation import Continuation, GenerationRequest
from server.settings.types import AUTO
from server.state import state_of

SEEDS = 2**64
_SLICE = 2**16  # bytes; uvicorn's high-water mark: it buffers no more until the client reads


async def run_all(
    request: Request, requests: Sequence[GenerationRequest], response_id: str | None = None
) -> list[Continuation]:
    """Runs the requests concurrently and returns the finished continuations; cancelled on disconnect."""
    accepted = _accepted(request, requests, response_id=response_id)

    async def work() -> list[Continuation]:
        opened = await model_of(request).service.open_all(accepted, held)
        runs = [asyncio.ensure_future(one.run()) for one in opened]
        try:
            # all are read as their tokens arrive, so that a stop string ends each at once
            return await asyncio.gather(*runs)
        finally:
            held.close()  # before any await, which a disconnect may cancel
            await cancelled(*runs)

    with ExitStack() as held:
        return await until_disconnect(request, work())


async def stream_all(
    request: Request,
    requests: Sequence[GenerationRequest],
    events: Callable[[list[Continuation]], AsyncGenerator[bytes]],
    response_id: str | None = None,
) -> EventStream:
    """Opens the requests and streams what ``events`` yields of them; closes them when the stream ends."""
    accepted = _accepted(request, requests, response_id=response_id, stream=True)
    with ExitStack() as held:
        service = model_of(request).service
        opened = await until_disconnect(request, service.open_all(accepted, held))
        headers, body = opening_headers(opened[0]), events(opened)
        return EventStream(body, held.pop_all().close, headers)


def _accepted(
    request: Request, requests: Sequence[GenerationRequest], **fields: Any
) -> list[GenerationRequest]:
    """The requests with what the HTTP request says of all of them."""
    owner = owner_of(request.scope)
    return [replace(one, owner=owner, **fields) for one in requests]


def whole(request: Request, content: Any, extra_headers: dict[str, str]) -> Response:
    """A JSON response. A large one is sent in slices and holds a place until it is read: otherwise slow
    clients could keep any number of large responses in memory."""
    response = JSONResponse(content, headers=extra_headers)
    if len(response.body) <= _SLICE:
        return response
    return Stream(_slices(response.body), state_of(request.app).places.hold(), response.headers)


async def _slices(body: bytes | memoryview) -> AsyncGenerator[bytes]:
    for at in range(0, len(body), _SLICE):
        yield bytes(body[at : at + _SLICE])


def timings(done: Continuation) -> dict[str, float]:
    """Durations in milliseconds, and generated tokens per second since admission."""
    timeline = done.timeline
    active = timeline.prefill_seconds + timeline.decode_seconds
    return {
        "queue_ms": round(timeline.queue_seconds * 1000, 3),
        "prefill_ms": round(timeline.prefill_seconds * 1000, 3),
        "decode_ms": round(timeline.decode_seconds * 1000, 3),
        "total_ms": round(timeline.total_seconds * 1000, 3),
        "tokens_per_second": round(len(done.pieces) / active, 3) if active > 0 else 0.0,
    }


def served(done: Continuation) -> dict[str, Any]:
    """The precision that served the request, and the reason if the server chose it."""
    fields: dict[str, Any] = {
        "precision": done.precision,
        "precision_requested": done.precision_requested,
        "fallback_reason": done.fallback_reason,
    }
    if done.choice is not None:
        fields["auto"] = {"decided_by": list(done.choice.decided_by), "reason": done.choice.reason}
    return fields


def headers(done: Continuation) -> dict[str, str]:
    """Response headers of a finished request; times in milliseconds."""
    timeline, count = done.timeline, len(done.pieces)
    inference = timeline.prefill_seconds + timeline.decode_seconds
    return {
        **opening_headers(done),
        "x-generated-tokens": str(count),
        "x-total-time": _ms(timeline.total_seconds),
        "x-queue-time": _ms(timeline.queue_seconds),
        "x-inference-time": _ms(inference),
        "x-time-per-token": _ms(inference / count if count else 0.0),
    }


def opening_headers(opened: Continuation) -> dict[str, str]:
    """Response headers that are known before the first token."""
    return {"X-Precision": opened.precision, "x-prompt-tokens": str(len(opened.prompt_ids))}


def _ms(seconds: float) -> str:
    return str(round(seconds * 1000))


def body_of(model: type[BaseModel], example: dict[str, Any], **extra: Any) -> dict[str, Any]:
    """The ``openapi_extra`` of a route that takes a ``model``; ``extra`` are further properties.

    Args:
        example: a body that every server accepts: /docs sends it.
    """
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})
    schema["properties"].update(extra)
    content = {"application/json": {"schema": _inlined(schema, definitions), "example": example}}
    return {"requestBody": {"required": True, "content": content}}


def precision_parameters(extra: dict[str, Any], *, named: bool = False) -> dict[str, Any]:
    """``extra`` with the query and header parameters of a precision; ``named``: and the path's model."""
    choice = {"type": "string", "enum": [*PRECISION_NAMES, AUTO]}
    parameters = [_parameter("query", "precision", choice), _parameter("header", "X-Precision", choice)]
    return {**extra, "parameters": [*parameters, _model("path" if named else "query")]}


def model_parameter(extra: Mapping[str, Any], *, named: bool = False) -> dict[str, Any]:
    """``extra`` with the query parameter that names one of several models; ``named``: the path's."""
    return {**extra, "parameters": [_model("path" if named else "query")]}


def _model(place: str) -> dict[str, Any]:
    return {**_parameter(place, "model", {"type": "string"}), "example": ANY_MODEL}


def _parameter(place: str, name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"in": place, "name": name, "required": place == "path", "schema": schema}


def _inlined(node: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_inlined(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _inlined(definitions[node["$ref"].rsplit("/", 1)[-1]], definitions)
    return {key: _inlined(value, definitions) for key, value in node.items()}
