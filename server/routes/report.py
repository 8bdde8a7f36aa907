"""``GET /report``: the saved report. ``POST /report``: a new one, with progress as server-sent events."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from server.errors import NotFound, Unavailable
from server.http.body import read_object
from server.http.route_facts import RouteFacts
from server.http.streaming import EventStream, event
from server.http.validation import Strict, validate
from server.report import plots
from server.report.files import as_json
from server.report.markdown import advice_of, markdown
from server.report.page import page
from server.routes.precision_choice import choose_model
from server.routes.schemas import NamesOrAll
from server.routes.shared import body_of, model_parameter
from server.served_model import ServedModel
from server.service.precision_state import known_precision
from server.settings.types import ALL

router = APIRouter(tags=["comparing"])
_JSON, _MARKDOWN, _HTML = "application/json", "text/markdown", "text/html"


class ReportBody(Strict):
    """Body of ``POST /report``; optional."""

    precisions: NamesOrAll = Field(
        None, description="all that this host can run if omitted", examples=[["fp32", "nf4"]]
    )
    text: str | None = Field(
        None, min_length=1, description="what quality is measured on; held-out documentation if omitted"
    )
    quality: bool = Field(True, description="false: only sizes and speeds")
    plots: bool | None = Field(None, description="drawn if matplotlib is installed, if omitted")
    fresh: bool = Field(False, description="true: repeat earlier measurements")


@router.get("/report", openapi_extra=model_parameter({}))
@RouteFacts(media_types=(_JSON, _MARKDOWN, _HTML))
async def kept(request: Request) -> Response:
    """The latest finished report: JSON, Markdown or HTML, by ``Accept``."""
    reports = choose_model(request).reports
    if (report := reports.latest()) is None:
        raise NotFound(reports.how_to_make_one())
    kind = preferred(request.headers.get("accept", ""), (_JSON, _MARKDOWN, _HTML))
    if kind == _HTML:
        return HTMLResponse(await asyncio.to_thread(page, report.document, report.folder))
    if kind == _MARKDOWN:
        return Response(markdown(report.document), media_type=_MARKDOWN)
    return JSONResponse(as_json(report.document))


_BODY = body_of(ReportBody, {"precisions": ["fp32"], "quality": False, "plots": False})
_BODY["requestBody"]["required"] = False


@router.post("/report", openapi_extra=model_parameter(_BODY))
@RouteFacts(admin=True, media_types=("text/event-stream",))
async def make(request: Request) -> Response:
    """Measures every precision in a separate process, with its progress as server-sent events."""
    model = choose_model(request)
    values = await read_object(request) if await request.body() else {}
    body = validate(ReportBody, values, model.settings)
    options = {
        "precisions": _select(model, body.precisions),
        "quality": body.quality,
        "plots": _draws_plots(body.plots),
        "fresh": body.fresh,
    }
    events = model.reports.make(options, body.text)
    first = await anext(events, None)  # raises a refusal before the 200 is sent
    return EventStream(_progress(model, first, events), model.reports.abandon, {})


async def _progress(
    model: ServedModel, first: dict[str, Any] | None, events: AsyncGenerator[Any]
) -> AsyncGenerator[bytes]:
    async with aclosing(events):
        if first is not None:
            yield event(first)
        async for progress in events:
            yield event(progress)
    report = model.reports.latest()
    advice = None if report is None else advice_of(report.document)
    yield event({
        "status": "ready",
        "recommendation": advice and {"precision": advice.precision, "sentences": list(advice.sentences)},
    })  # fmt: skip


def _draws_plots(plots_option: bool | None) -> bool:
    try:
        return plots.to_draw(plots_option)
    except plots.PlotsUnavailable as error:
        raise Unavailable(f'{error}; or send "plots": false') from None


def _select(model: ServedModel, precisions: Any) -> list[str]:
    """Names of the precisions that can run on this host.

    Raises:
        Unavailable: one that was named can't.
    """
    if precisions is None or precisions == ALL:
        return [one.name for one in model.pool.states() if one.state != "unavailable"]
    names = list(dict.fromkeys(known_precision(name) for name in precisions))
    for name in names:
        if (one := model.pool.state(name)).state == "unavailable":
            raise one.refusal()
    return names


def preferred(accept: str, offered: tuple[str, ...]) -> str:
    """The offered type with the highest weight in ``accept``; the first offered if none matches."""
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
