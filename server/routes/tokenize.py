"""``POST /tokenize``: a text's tokens, in the format of Text Generation Inference."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import ExitStack

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.errors import PromptTooLong
from server.http.body import read_object
from server.http.route_facts import RouteFacts
from server.http.streaming import Stream, until_disconnect
from server.http.validation import validate
from server.routes.precision_choice import choose_model
from server.routes.schemas import TokenizeBody
from server.routes.shared import body_of, model_parameter
from server.service.text.prompt_encoder import Tokens

router = APIRouter(tags=["looking"])
_CHARACTERS = 250_000  # accepted of a text, or the usual length of the longest prompt if that is more
_CHARACTERS_A_TOKEN = 8
_PIECE = 512  # tokens, encoded to JSON in a millisecond
_JSON = "application/json"
_BODY = body_of(TokenizeBody, {"inputs": "Once upon a time"})
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@router.post("/tokenize", openapi_extra=model_parameter(_BODY))
@router.post("/models/{model:path}/tokenize", openapi_extra=model_parameter(_BODY, named=True))
@RouteFacts(takes_a_place=True, example=[{"id": 451, "text": "The", "start": 0, "stop": 3}])
async def tokenize(request: Request) -> Response:
    """The tokens of a text and their offsets in it."""
    values, model = await read_object(request), choose_model(request)
    body = validate(TokenizeBody, values, model.settings)
    _check_length(len(body.inputs), model.service.max_total_tokens)
    deadline = time.perf_counter() + model.settings.request_timeout
    with ExitStack() as held:
        held.enter_context(model.service.places.reserved())
        tokens = await until_disconnect(request, model.service.prompts.tokenize(body.inputs, deadline))
        if len(tokens) <= _PIECE:
            return Response(b"[%b]" % _rendered(tokens, 0), media_type=_JSON)
        # the place is held until all is sent, which bounds the memory of unsent responses
        return Stream(_pieces(tokens), held.pop_all().close, {"Content-Type": _JSON})


def _check_length(characters: int, max_total_tokens: int) -> None:
    most = max(_CHARACTERS, _CHARACTERS_A_TOKEN * max_total_tokens)
    if characters > most:
        raise PromptTooLong(
            f"the text has {characters} characters; at most {most} are accepted", param="inputs"
        )


async def _pieces(tokens: Tokens) -> AsyncGenerator[bytes]:
    yield b"["
    for first in range(0, len(tokens), _PIECE):
        yield (b"," if first else b"") + _rendered(tokens, first)
        await asyncio.sleep(0)  # a fast client doesn't occupy the event loop
    yield b"]"


def _rendered(tokens: Tokens, first: int) -> bytes:
    return ",".join(_encode(vars(span)) for span in tokens.spans(first, _PIECE)).encode()
