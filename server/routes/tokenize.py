"""``POST /tokenize``: a text's tokens, as Text Generation Inference shows them."""

import asyncio
import json

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.body import read_object
from server.routes.shared import body_of
from server.schemas import TokenizeBody
from server.text import TextCodec
from server.validation import validate

router = APIRouter(tags=["looking"])
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@router.post("/tokenize", openapi_extra=body_of(TokenizeBody, {"inputs": "Once upon a time"}))
async def tokenize(request: Request) -> Response:
    """The tokens of a text and where each stands in it."""
    values, state = await read_object(request), request.app.state
    body = validate(TokenizeBody, values, state.settings)
    with state.service.place():
        content = await asyncio.to_thread(_rendered, state.codec, body.inputs)
    return Response(content, media_type="application/json")


def _rendered(codec: TextCodec, text: str) -> bytes:
    """Token by token: a long text's, encoded in one go, would keep the event loop waiting for seconds."""
    return f"[{','.join(_encode(vars(span)) for span in codec.tokenize(text))}]".encode()
