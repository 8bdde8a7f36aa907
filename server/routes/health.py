"""GET /health, /health/live, /health/ready."""

from fastapi import APIRouter, Request

from server.errors import NotReady
from server.state import state_of

router = APIRouter(prefix="/health", tags=["health"])


@router.get("/live")
async def live() -> dict[str, str]:
    """The process answers."""
    return {"status": "live"}


@router.get("")
@router.get("/ready")
async def ready(request: Request) -> dict[str, str]:
    """The default precision is loaded, warm and making progress; 503 with the reason otherwise."""
    state = state_of(request.app)
    state.lifecycle.check()
    default = state.pool.state(state.pool.default)
    if default.engine is None:
        raise NotReady(f"{default.name} is {default.state}{f': {default.reason}' if default.reason else ''}")
    if (unwell := default.engine.health()) is not None:
        raise NotReady(f"{default.name}: {unwell}")
    return {"status": "ready", "precision": default.name}
