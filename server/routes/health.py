"""``GET /health``, ``/health/live`` and ``/health/ready``."""

from fastapi import APIRouter, Request

from server.errors import NotReady, UnknownModel
from server.http.route_facts import RouteFacts
from server.routes.precision_choice import choose_model
from server.routes.shared import model_parameter
from server.state import state_of

router = APIRouter(tags=["health"])
_POLLED = RouteFacts(public=True, quiet=True)


@router.get("/health/live")
@_POLLED
async def live() -> dict[str, str]:
    """200 while the process serves requests."""
    return {"status": "live"}


@router.get("/health", openapi_extra=model_parameter({}))
@router.get("/health/ready", openapi_extra=model_parameter({}))
@router.get("/models/{model:path}/health", openapi_extra=model_parameter({}, named=True))
@_POLLED
async def ready(request: Request) -> dict[str, str]:
    """200 if the default precision is loaded, warm and making progress; 503 with the reason otherwise.

    Of the default model, or of the one that is named.
    """
    state_of(request.app).lifecycle.check()
    try:
        pool = choose_model(request).pool
    except UnknownModel:
        raise UnknownModel("no such model here", param="model") from None  # the route needs no key: no names
    default = pool.state(pool.default)
    title = pool.title(default)
    if default.engine is None:
        raise NotReady(f"{title} is {default.state}{f': {default.reason}' if default.reason else ''}")
    if (fault := default.engine.health()) is not None:
        raise NotReady(f"{title}: {fault}")
    return {"status": "ready", "precision": default.name}
