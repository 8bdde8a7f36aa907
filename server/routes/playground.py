"""``GET /``: the playground, a page for browsers, and ``GET /playground/…``: its style and modules.

They are the same for everyone and hold nothing of the model, so they need no key; what they request does.
"""

from pathlib import Path

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

import server.playground
from server.http.route_facts import RouteFacts

router = APIRouter()
_FOLDER = Path(server.playground.__file__).with_name("static")
_FILES = StaticFiles(directory=_FOLDER)
_HEADERS = {
    # whatever a model writes: nothing on the page runs or loads what did not come from this server's package
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # revalidated by its ETag, so that an updated server has an updated page
}


@router.get("/", include_in_schema=False)
@RouteFacts(public=True)
async def page(request: Request) -> Response:
    """The page for clients that accept HTML; for others ``/`` takes POST alone.

    Raises:
        HTTPException: 405.
    """
    if "text/html" not in request.headers.get("accept", "").lower():
        raise HTTPException(405)
    response = await _file("index.html", request)
    response.headers["Vary"] = "Accept"
    return response


@router.get("/playground/{name:path}", include_in_schema=False)
@RouteFacts(public=True, quiet=True)  # some dozen for a page
async def file(name: str, request: Request) -> Response:
    """A file of the page, or a 304 to a client that has it.

    Raises:
        HTTPException: 404.
    """
    return await _file(name, request)


async def _file(name: str, request: Request) -> Response:
    response = await _FILES.get_response(name, request.scope)
    response.headers.update(_HEADERS)
    return response
