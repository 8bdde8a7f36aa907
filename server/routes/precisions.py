"""GET /precisions; POST /precisions/{name}/load and /unload for the admin."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import WithJsonSchema

import loaders
from loaders.errors import LoaderError
from server.errors import BadPrecision, ServiceError
from server.http.streaming import EventStream, event
from server.routes.schemas import PRECISION_NAMES
from server.service.pool import Pool
from server.service.precision_state import PrecisionState
from server.state import state_of

router = APIRouter(prefix="/precisions", tags=["precisions"])
PrecisionName = Annotated[str, WithJsonSchema({"type": "string", "enum": PRECISION_NAMES})]
# in /docs, which takes the first otherwise: every host can run this one, and the server lives without it
_CHOSEN = {"type": "string", "enum": PRECISION_NAMES, "default": "bf16"}
Changed = Annotated[str, WithJsonSchema(_CHOSEN)]


def known(name: PrecisionName) -> str:
    """The registry's name.

    Raises:
        BadPrecision
    """
    try:
        return loaders.canonical(name)
    except LoaderError as error:
        raise BadPrecision(str(error)) from None


@router.get("")
async def list_precisions(request: Request) -> list[dict[str, Any]]:
    """Every precision of the registry and its state on this host."""
    return [_describe(state) for state in state_of(request.app).pool.states()]


@router.post("/{name}/load")
async def load(request: Request, name: Changed) -> Response:
    """Loads a precision; server-sent events tell the progress."""
    state = state_of(request.app)
    state.lifecycle.check()
    precision = state.pool.state(known(name))
    if precision.state == "unavailable":
        raise precision.refusal()
    return EventStream(_progress(state.pool, precision.name), lambda: None, {})


@router.post("/{name}/unload")
async def unload(request: Request, name: Changed) -> dict[str, Any]:
    """Drops a precision's weights; what it is generating ends with an error."""
    pool = state_of(request.app).pool
    await pool.unload(known(name))
    return _describe(pool.state(known(name)))


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
