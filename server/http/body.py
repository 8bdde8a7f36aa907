"""A request's body, parsed as a JSON object."""

import json
import math
from typing import Any, NoReturn

from starlette.requests import Request

from server.errors import BadRequest, UnsupportedMedia


async def read_object(request: Request) -> dict[str, Any]:
    """Reads the body and parses it strictly.

    Raises:
        UnsupportedMedia: the content type is not JSON, or the body is compressed.
        BadRequest: the body is not UTF-8, not JSON (NaN and Infinity included), or not an object.
    """
    media = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if media != "application/json" and not (media.startswith("application/") and media.endswith("+json")):
        raise UnsupportedMedia("the body must be application/json")
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise UnsupportedMedia("the body must not be compressed")
    return parse_object(await request.body())


def parse_object(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode(), parse_constant=_reject_constant, parse_float=_finite_float)
    except UnicodeDecodeError:
        raise BadRequest("the body is not UTF-8") from None
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None
    except ValueError:
        raise BadRequest("the body is not valid JSON") from None
    if not isinstance(value, dict):
        raise BadRequest("the body must be a JSON object")
    return value


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _finite_float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError("out of range")
    return number
