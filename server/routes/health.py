"""``GET /health``, ``/health/live`` and ``/health/ready``."""

from fastapi import APIRouter, Request

from server.errors import NotReady
from server.http.route_facts import RouteFacts
from server.state import state_of

router = APIRouter(prefix="/health", tags=["health"])
_POLLED = RouteFacts(public=True, quiet=True)


@router.get("/live")
@_POLLED
async def live() -> dict[str, str]:
    """200 while the process serves requests."""
    return {"status": "live"}


@router.get("")
@router.get("/ready")
@_POLLED
async def ready(request: Request) -> dict[str, str]:
    """200 if the default precision is loaded, warm and making progress; 503 with the reason otherwise."""
    state = state_of(request.app)
    state.lifecycle.check()
    default = state.pool.state(state.pool.default)
    if default.engine is None:
        raise NotReady(f"{default.name} is {default.state}{f': {default.reason}' if default.reason else ''}")
    if (fault := default.engine.health()) is not None:
        raise NotReady(f"{default.name}: {fault}")
    return {"status": "ready", "precision": default.name}
