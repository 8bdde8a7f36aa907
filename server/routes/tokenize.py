"""``POST /tokenize``: a text's tokens, as Text Generation Inference shows them."""

import asyncio
from dataclasses import asdict

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.body import read_object
from server.routes.shared import body_of
from server.schemas import TokenizeBody, validate

router = APIRouter(tags=["looking"])


@router.post("/tokenize", openapi_extra=body_of(TokenizeBody))
async def tokenize(request: Request) -> Response:
    """The tokens of a text and where each stands in it."""
    values, state = await read_object(request), request.app.state
    body = validate(TokenizeBody, values, state.settings)
    spans = await asyncio.to_thread(state.codec.tokenize, body.inputs)
    return JSONResponse([asdict(span) for span in spans])
