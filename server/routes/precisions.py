"""``GET /precisions``; ``POST /precisions/{name}/load`` and ``/unload`` with the administrator's key."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import WithJsonSchema

import loaders
from server.errors import ServiceError
from server.http.route_facts import RouteFacts
from server.http.streaming import EventStream, event
from server.routes.precision_choice import choose_model
from server.routes.schemas import PRECISION_NAMES
from server.routes.shared import model_parameter
from server.service.pool import Pool
from server.service.precision_state import PrecisionState, known_precision
from server.settings.types import ALL
from server.state import state_of

router = APIRouter(prefix="/precisions", tags=["precisions"])
PrecisionName = Annotated[str, WithJsonSchema({"type": "string", "enum": PRECISION_NAMES})]
# the value that /docs fills in: every host can run this one, and the server can do without it
_IN_DOCS = {"type": "string", "enum": PRECISION_NAMES, "default": "bf16"}
TargetName = Annotated[str, WithJsonSchema(_IN_DOCS)]
UnloadedName = Annotated[str, WithJsonSchema({**_IN_DOCS, "enum": [*PRECISION_NAMES, ALL]})]


@router.get("", openapi_extra=model_parameter({}))
async def list_precisions(request: Request) -> list[dict[str, Any]]:
    """Every precision and its state on this host."""
    return [_describe(state) for state in choose_model(request).pool.states()]


@router.post("/{name}/load", openapi_extra=model_parameter({}))
@RouteFacts(admin=True, media_types=("text/event-stream",))
async def load(request: Request, name: TargetName) -> Response:
    """Loads a precision, with its progress as server-sent events."""
    pool = choose_model(request).pool
    state_of(request.app).lifecycle.check()
    state = pool.state(known_precision(name))
    if state.state == "unavailable":
        raise state.refusal()
    return EventStream(_progress(pool, state.name), lambda: None, {})


@router.post("/{name}/unload", openapi_extra=model_parameter({}))
@RouteFacts(admin=True)
async def unload(request: Request, name: UnloadedName) -> dict[str, Any] | list[dict[str, Any]]:
    """Frees a precision's weights; its running requests end with an error.

    ``all``: of every precision of the model; the response is a list.
    """
    pool = choose_model(request).pool
    if name == ALL:
        for state in pool.states():
            await pool.unload(state.name)
        return [_describe(state) for state in pool.states()]
    await pool.unload(known_precision(name))
    return _describe(pool.state(known_precision(name)))


async def _progress(pool: Pool, name: PrecisionName) -> AsyncGenerator[bytes]:
    try:
        async with aclosing(pool.load(name)) as steps:
            async for step in steps:
                progress = {"current": step.current, "total": step.total}
                yield event({"status": "loading", "stage": step.stage, "progress": progress})
        yield event({"status": "ready"})
    except ServiceError as error:
        yield event({"status": "failed", "error": error.message, "error_type": error.error_type})


def _describe(state: PrecisionState) -> dict[str, Any]:
    return {
        "name": state.name,
        "aliases": loaders.aliases(state.name),
        "state": state.state,
        "reason": state.reason,
        "install": state.install,
    }
