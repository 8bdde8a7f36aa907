"""The dialect of Text Generation Inference: ``/generate``, ``/generate_stream`` and ``/``."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.engine.sequence import PromptToken, Token, drawn_seed
from server.http.body import read_object
from server.http.route_facts import RouteFacts
from server.http.streaming import event
from server.http.validation import validate
from server.routes.generation_request import make_request, merge_parameters
from server.routes.precision_choice import PrecisionChoice, choose_precision, model_of, resolve_precision
from server.routes.schemas import GenerateBody, Parameters
from server.routes.shared import (
    SEEDS,
    body_of,
    headers,
    precision_parameters,
    run_all,
    served,
    stream_all,
    timings,
    whole,
)
from server.service.generation import Continuation, GenerationRequest, Piece
from server.service.text.codec import TextCodec

router = APIRouter(tags=["generate"])
_parameters = Parameters.model_json_schema()
_prompt = {"type": "string", "minLength": 1, "description": "alias of inputs"}
_EXAMPLE = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 20}}
_BODY = body_of(GenerateBody, _EXAMPLE, parameters=_parameters, prompt=_prompt)
_schema = _BODY["requestBody"]["content"]["application/json"]["schema"]
del _schema["required"]
_schema["oneOf"] = [{"required": ["inputs"]}, {"required": ["prompt"]}]
_RESPONSE = {
    "generated_text": "s are not a statement",
    "precision": "int8",
    "details": None,
    "usage": {"prompt_tokens": 3, "cached_tokens": 0, "generated_tokens": 5},
    "timings": {
        "queue_ms": 0.217,
        "prefill_ms": 3.335,
        "decode_ms": 12.97,
        "total_ms": 16.52,
        "tokens_per_second": 736.0,
    },
    "precision_requested": "int8",
    "fallback_reason": None,
}
_EVENTS = "text/event-stream"
_FACTS = RouteFacts(
    takes_a_place=True, generates=True, media_types=("application/json", _EVENTS), example=_RESPONSE
)
_PLAIN, _NAMED = precision_parameters(_BODY), precision_parameters(_BODY, named=True)


@router.post("/generate", openapi_extra=_PLAIN)
@router.post("/models/{model:path}/generate", openapi_extra=_NAMED)
@_FACTS
async def generate(request: Request) -> Response:
    """Continues a prompt; with ``stream``, token by token."""
    return await _answer(request)


@router.post("/generate_stream", openapi_extra=_PLAIN)
@router.post("/models/{model:path}/generate_stream", openapi_extra=_NAMED)
@replace(_FACTS, media_types=(_EVENTS,), example=None)
async def generate_stream(request: Request) -> Response:
    """Continues a prompt token by token, as server-sent events."""
    return await _answer(request, stream=True)


root_router = APIRouter(tags=["generate"])
"""Included last: its path with a model's name matches everything under ``/models``."""


@root_router.post("/", openapi_extra=_PLAIN)
@root_router.post("/models/{model:path}", openapi_extra=_NAMED)
@replace(_FACTS, example=[_RESPONSE])
async def compatible(request: Request) -> Response:
    """As ``/generate``, for clients that post to the base URL; the response is a list of one element."""
    return await _answer(request, listed=True)


async def _answer(request: Request, stream: bool = False, listed: bool = False) -> Response:
    values = merge_parameters(await read_object(request))
    precision = choose_precision(request, values)
    model = model_of(request)
    body = validate(GenerateBody, values, model.settings)
    requested = resolve_precision(request, precision, body.auto)
    if stream or body.stream:
        body.check_stream()
        return await _stream(request, body, requested)
    done = await run_all(request, _requests(body, requested))
    done.sort(key=attrgetter("mean_logprob"), reverse=True)
    reply = _reply(body, done, model.codec)
    return whole(request, [reply] if listed else reply, headers(done[0]))


def _requests(body: GenerateBody, requested: PrecisionChoice) -> list[GenerationRequest]:
    count = body.best_of or 1
    first = drawn_seed() if body.seed is None else body.seed
    detailed = bool(body.details or body.decoder_input_details)
    return [
        make_request(
            body.inputs,
            body,
            requested=requested,
            fallback=body.fallback,
            seed=(first + i) % SEEDS,
            logprobs=detailed or count > 1 or bool(body.stream),
            top_n=body.top_n_tokens or 0,
            prompt_logprobs=bool(body.decoder_input_details),
        )
        for i in range(count)
    ]


def _reply(body: GenerateBody, done: list[Continuation], codec: TextCodec) -> dict[str, Any]:
    best, details = done[0], None
    if body.details or body.decoder_input_details:
        details = _sequence(body, best, codec)
        others = [{"generated_text": _text(body, d), **_sequence(body, d, codec)} for d in done[1:]]
        details["best_of_sequences"] = others or None
    return {
        "generated_text": _text(body, best),
        "details": details,
        "usage": {
            "prompt_tokens": len(best.prompt_ids),
            "cached_tokens": best.cached_tokens,
            "generated_tokens": len(best.pieces),
        },
        "timings": timings(best),
        **served(best),
    }


def _text(body: GenerateBody, done: Continuation) -> str:
    return body.inputs + done.text if body.return_full_text else done.text


def _sequence(body: GenerateBody, done: Continuation, codec: TextCodec) -> dict[str, Any]:
    prefill = done.prompt_tokens if body.decoder_input_details else []
    texts = codec.shares(done.prompt_ids, [piece.token.id for piece in done.pieces])
    details: dict[str, Any] = {
        **_summary(done),
        "prefill": [_prompt_token(token, codec) for token in prefill],
        "tokens": [
            _token(piece, codec.token_text(piece.token.id) if piece.special else text)
            for piece, text in zip(done.pieces, texts, strict=True)
        ],
    }
    if body.top_n_tokens:
        details["top_tokens"] = [_top(piece.token, codec) for piece in done.pieces]
    return details


def _summary(done: Continuation) -> dict[str, Any]:
    return {
        "finish_reason": done.finish_reason,
        "generated_tokens": len(done.pieces),
        "seed": done.seed,
    }


def _prompt_token(token: PromptToken, codec: TextCodec) -> dict[str, Any]:
    return {"id": token.id, "text": codec.token_text(token.id), "logprob": token.logprob}


def _token(piece: Piece, text: str) -> dict[str, Any]:
    return {
        "id": piece.token.id,
        "text": text,
        "logprob": piece.token.logprob,
        "special": piece.special,
    }


def _top(token: Token, codec: TextCodec) -> list[dict[str, Any]]:
    return [
        {
            "id": top.id,
            "text": codec.token_text(top.id),
            "logprob": top.logprob,
            "special": codec.is_special(top.id),
        }
        for top in token.top
    ]


async def _stream(request: Request, body: GenerateBody, requested: PrecisionChoice) -> Response:
    body.stream = True
    codec = model_of(request).codec
    return await stream_all(request, _requests(body, requested), partial(_events, body, codec))


async def _events(body: GenerateBody, codec: TextCodec, opened: list[Continuation]) -> AsyncGenerator[bytes]:
    async with aclosing(opened[0].chunks()) as chunks:
        async for chunk in chunks:
            yield b"".join(_event(body, opened[0], codec, piece) for piece in chunk)


def _event(body: GenerateBody, opened: Continuation, codec: TextCodec, piece: Piece) -> bytes:
    # the released text rather than the token's: joined, the events are the text without any stop string
    data: dict[str, Any] = {"index": piece.index, "token": _token(piece, piece.text)}
    if body.top_n_tokens:
        data["top_tokens"] = _top(piece.token, codec)
    last = _final_fields(body, opened) if piece.finish else {"generated_text": None, "details": None}
    return event(data | last)


def _final_fields(body: GenerateBody, done: Continuation) -> dict[str, Any]:
    return {
        "generated_text": _text(body, done),
        "details": {**_summary(done), "input_length": len(done.prompt_ids)},
        **served(done),
        "timings": timings(done),
    }
