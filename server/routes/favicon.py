"""``GET /favicon.ico``: browsers request it with ``/docs``, whatever icon the page names."""

from fastapi import APIRouter
from starlette.responses import Response

from server.http.route_facts import RouteFacts

router = APIRouter()
_DIAL = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">'
    '<rect width="32" height="32" rx="7" fill="#1b5e9b"/>'
    '<g fill="none" stroke="#fff" stroke-width="3" stroke-linecap="round">'
    '<path d="M7 22a10.5 10.5 0 1 1 18 0"/><path d="M16 18l5-7"/></g></svg>'
)


@router.get("/favicon.ico", include_in_schema=False)
@RouteFacts(public=True)
async def favicon() -> Response:
    return Response(_DIAL, media_type="image/svg+xml", headers={"Cache-Control": "max-age=86400"})
