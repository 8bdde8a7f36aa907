"""``GET /report``: the kept report. ``POST /report``: a new one, its progress as server-sent events."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from pydantic import Field
from starlette.datastructures import State
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from server.errors import NotFound, Unavailable
from server.http.body import read_object
from server.http.streaming import EventStream, event
from server.http.validation import Strict, validate
from server.report import plots
from server.report.files import as_json
from server.report.markdown import advice_of, markdown
from server.report.page import page
from server.routes.precision_choice import known_precision
from server.routes.schemas import NamesOrAll
from server.routes.shared import body_of
from server.settings.types import ALL

router = APIRouter(tags=["comparing"])
_JSON, _MARKDOWN, _HTML = "application/json", "text/markdown", "text/html"


class ReportBody(Strict):
    """``POST /report``; all of it may be left out."""

    precisions: NamesOrAll = Field(
        None, description="all that this host can run, if left out", examples=[["fp32", "nf4"]]
    )
    text: str | None = Field(
        None, min_length=1, description="what quality is measured on; held-out documentation if left out"
    )
    quality: bool = Field(True, description="false: sizes and speeds alone")
    plots: bool | None = Field(None, description="drawn where matplotlib is installed, if left out")
    fresh: bool = Field(False, description="true: measure anew what was measured before")


@router.get("/report")
async def kept(request: Request) -> Response:
    """The report that was finished last: JSON, Markdown or a page, by Accept."""
    report = request.app.state.reports.latest()
    if report is None:
        raise NotFound(request.app.state.reports.how_to_make_one())
    kind = preferred(request.headers.get("accept", ""), (_JSON, _MARKDOWN, _HTML))
    if kind == _HTML:
        return HTMLResponse(await asyncio.to_thread(page, report.document, report.folder))
    if kind == _MARKDOWN:
        return Response(markdown(report.document), media_type=_MARKDOWN)
    return JSONResponse(as_json(report.document))


_BODY = body_of(ReportBody, {"precisions": ["fp32"], "quality": False, "plots": False})
_BODY["requestBody"]["required"] = False


@router.post("/report", openapi_extra=_BODY)
async def make(request: Request) -> Response:
    """Measures every precision in a process of its own; server-sent events tell the progress."""
    state = request.app.state
    values = await read_object(request) if await request.body() else {}
    body = validate(ReportBody, values, state.settings)
    wishes = {
        "precisions": _chosen(state, body.precisions),
        "quality": body.quality,
        "plots": _draws(body.plots),
        "fresh": body.fresh,
    }
    events = state.reports.make(wishes, body.text)
    first = await anext(events, None)  # refusals have their own status
    return EventStream(_told(state, first, events), state.reports.abandon, {})


async def _told(
    state: State, first: dict[str, Any] | None, events: AsyncGenerator[Any]
) -> AsyncGenerator[bytes]:
    async with aclosing(events):
        if first is not None:
            yield event(first)
        async for one in events:
            yield event(one)
    report = state.reports.latest()
    advice = None if report is None else advice_of(report.document)
    yield event({
        "status": "ready",
        "recommendation": advice and {"precision": advice.precision, "sentences": list(advice.sentences)},
    })  # fmt: skip


def _draws(asked: bool | None) -> bool:
    try:
        return plots.to_draw(asked)
    except plots.PlotsUnavailable as error:
        raise Unavailable(f'{error}; or send "plots": false') from None


def _chosen(state: State, asked: Any) -> list[str]:
    """Those that can run here; one that was named and can't is an error."""
    if asked is None or asked == ALL:
        return [one.name for one in state.pool.states() if one.state != "unavailable"]
    names = list(dict.fromkeys(known_precision(name) for name in asked))
    for name in names:
        if (one := state.pool.state(name)).state == "unavailable":
            raise one.refusal()
    return names


def preferred(accept: str, offered: tuple[str, ...]) -> str:
    """The first of the offered kinds that the header wants most; the first offered where it wants none."""
    weights: dict[str, float] = {}
    for part in accept.split(","):
        kind, *parameters = (piece.strip().lower() for piece in part.split(";"))
        weight = next((piece[2:] for piece in parameters if piece.startswith("q=")), "1")
        try:
            weights[kind] = float(weight)
        except ValueError:
            weights[kind] = 0.0
    named = {kind: weights[kind] for kind in offered if weights.get(kind)}
    return max(named, key=lambda kind: named[kind]) if named else offered[0]
