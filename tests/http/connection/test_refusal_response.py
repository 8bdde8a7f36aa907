"""Responses encoded from templates are those that the framework sends."""

import json
from typing import Any

import pytest

from server.errors import GenerationFailed, Invalid, NotReady, Overloaded, ServiceError, Unauthorized
from server.http.connection.refusal_response import RefusalResponses
from server.http.responses import error_response
from server.http.route_facts import Dialect

ERRORS = [
    Overloaded("all 8 places are taken", retry_after=7, retry_spread=0),
    NotReady("the server is shutting down", retry_spread=0),
    Unauthorized("a valid key is needed: Authorization: Bearer <key>"),
    Invalid('inputs: "ä" is not\r\na text', param="inputs"),
    GenerationFailed("x" * 2000),
]


def from_the_framework(error: ServiceError, dialect: Dialect, id_: str) -> tuple[int, dict[str, str], Any]:
    path = "/generate" if dialect is Dialect.NATIVE else "/v1/completions"
    scope = {"path": path, "state": {"request_id": id_}}
    response = error_response(error, scope)
    headers = {name.decode(): value.decode() for name, value in response.raw_headers}
    return response.status_code, {**headers, "x-request-id": id_}, json.loads(bytes(response.body))


def parsed(response: bytes) -> tuple[int, dict[str, str], Any]:
    head, _, body = response.partition(b"\r\n\r\n")
    first, *lines = head.decode("ascii").split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    assert int(headers["content-length"]) == len(body)
    return int(first.split()[1]), headers, json.loads(body)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("dialect", [Dialect.NATIVE, Dialect.OPENAI])
def test_it_equals_the_frameworks_response(error: ServiceError, dialect: Dialect) -> None:
    responses = RefusalResponses()
    for id_, close in (("one", False), ("another:+/=._-", True)):
        status, sent = responses.encoded(error, dialect, id_, close)
        found, headers, body = parsed(sent)
        expected, wanted, text = from_the_framework(error, dialect, id_)
        assert (found, body) == (status, text) == (expected, text)
        assert headers.pop("connection", "") == ("close" if close else "")
        assert headers.pop("date").endswith(" GMT")
        assert headers.pop("content-length")
        wanted.pop("content-length")
        assert headers == wanted
