"""GET /precisions; POST /precisions/{name}/load and /unload for the admin."""

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
from server.routes.schemas import PRECISION_NAMES
from server.service.pool import Pool
from server.service.precision_state import PrecisionState, known_precision

router = APIRouter(prefix="/precisions", tags=["precisions"])
PrecisionName = Annotated[str, WithJsonSchema({"type": "string", "enum": PRECISION_NAMES})]
# in /docs, which takes the first otherwise: every host can run this one, and the server lives without it
_CHOSEN = {"type": "string", "enum": PRECISION_NAMES, "default": "bf16"}
Changed = Annotated[str, WithJsonSchema(_CHOSEN)]


@router.get("")
async def list_precisions(request: Request) -> list[dict[str, Any]]:
    """Every precision of the registry and its state on this host."""
    return [_describe(state) for state in request.app.state.pool.states()]


@router.post("/{name}/load")
@RouteFacts(admin=True, media_types=("text/event-stream",))
async def load(request: Request, name: Changed) -> Response:
    """Loads a precision; server-sent events tell the progress."""
    pool: Pool = request.app.state.pool
    request.app.state.lifecycle.check()
    state = pool.state(known_precision(name))
    if state.state == "unavailable":
        raise state.refusal()
    return EventStream(_progress(pool, state.name), lambda: None, {})


@router.post("/{name}/unload")
@RouteFacts(admin=True)
async def unload(request: Request, name: Changed) -> dict[str, Any]:
    """Drops a precision's weights; what it is generating ends with an error."""
    pool: Pool = request.app.state.pool
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
