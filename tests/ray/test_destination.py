"""Which deployment a request goes to: wherever the precision may be named."""

import json
from typing import Any

import pytest

from server.http.route_facts import Dialect
from server.ray.destination import Destination, destination

MODELS = ["owner/gpt2", "small"]


def found(
    path: str,
    body: Any,
    query: bytes = b"",
    headers: tuple[tuple[bytes, bytes], ...] = (),
    dialect: Dialect = Dialect.NATIVE,
) -> Destination:
    scope = {"type": "http", "method": "POST", "path": path, "query_string": query, "headers": list(headers)}
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return destination(scope, raw, dialect, MODELS)


@pytest.mark.parametrize(
    ("path", "more", "query", "headers"),
    [
        ("/generate", {"precision": "int8"}, b"", ()),
        ("/generate", {"parameters": {"precision": "8bit"}}, b"", ()),
        ("/generate", {}, b"precision=int8", ()),
        ("/generate", {}, b"", ((b"x-precision", b"bnb-8bit"),)),
        ("/models/gpt2:int8/generate", {}, b"", ()),
        ("/models/owner/gpt2:int8/generate_stream", {}, b"", ()),
        ("/models/tgi:int8", {}, b"", ()),
        ("/", {"precision": "int8"}, b"precision=int8", ()),
        ("/models/small:int8/generate", {}, b"", ()),
        ("/generate", {}, b"model=small:int8", ()),
    ],
)
def test_a_native_request_names_it(
    path: str, more: dict[str, Any], query: bytes, headers: tuple[tuple[bytes, bytes], ...]
) -> None:
    assert found(path, {"inputs": "x", **more}, query, headers).precision == "int8"


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/v1/completions", {"model": "gpt2:int8"}),
        ("/v1/completions", {"model": "gpt2", "precision": "int8"}),
        ("/models/gpt2:int8/v1/completions", {"model": "gpt2"}),
    ],
)
def test_an_openai_request_names_it(path: str, more: dict[str, Any]) -> None:
    assert found(path, {"prompt": "x", **more}, dialect=Dialect.OPENAI).precision == "int8"


@pytest.mark.parametrize(
    ("path", "body", "query", "dialect"),
    [
        ("/generate", {"inputs": "x"}, b"", Dialect.NATIVE),
        ("/generate", {"inputs": "x", "precision": "int8"}, b"precision=fp32", Dialect.NATIVE),
        ("/generate", {"inputs": "x", "precision": "int3"}, b"", Dialect.NATIVE),
        ("/generate", {"inputs": "x", "precision": ["int8"]}, b"", Dialect.NATIVE),
        ("/generate", {"precision": "int8", "parameters": {"precision": "int8"}}, b"", Dialect.NATIVE),
        ("/models/small:int8/generate", {"inputs": "x"}, b"model=gpt2", Dialect.NATIVE),
        ("/models/other:int8/generate", {"inputs": "x"}, b"", Dialect.NATIVE),
        ("/generate", b"{", b"", Dialect.NATIVE),
        ("/generate", b"[" * 200_000, b"", Dialect.NATIVE),
        ("/generate", b"\xff", b"", Dialect.NATIVE),
        ("/v1/completions", {"prompt": "x", "model": 7}, b"", Dialect.OPENAI),
    ],
)
def test_what_is_not_valid_goes_to_the_default(path: str, body: Any, query: bytes, dialect: Dialect) -> None:
    assert found(path, body, query, dialect=dialect).precision is None


def test_auto_is_passed_on_with_its_bounds() -> None:
    assert found("/generate", {"inputs": "x", "precision": "auto"}).precision == "auto"
    bounded = found("/generate", {"inputs": "x", "auto": {"max_kl": 0.1}})
    assert (bounded.precision, bounded.bounds) == ("auto", {"max_kl": 0.1})


def nested(value: Any, levels: int, name: str | None = None) -> Any:
    """``value`` inside so many lists, or objects."""
    for _ in range(levels):
        value = [value] if name is None else {name: value}
    return value


@pytest.mark.parametrize(
    ("body", "dialect", "text"),
    [
        ({"inputs": "abc"}, Dialect.NATIVE, "abc"),
        ({"prompt": ["ab", "c"]}, Dialect.OPENAI, "abc"),
        ({"prompt": [1, 2]}, Dialect.OPENAI, "1 2 "),
        (
            {"messages": [{"role": "user", "content": "a"}, {"content": [{"type": "text", "text": "b"}]}]},
            Dialect.OPENAI_CHAT,
            "ab",
        ),
        ({"inputs": ""}, Dialect.NATIVE, ""),
        ({}, Dialect.NATIVE, ""),
        ({"prompt": nested(["deep"], 400)}, Dialect.OPENAI, ""),
        ({"messages": nested({"content": "deep"}, 400, "content")}, Dialect.OPENAI_CHAT, ""),
    ],
)
def test_the_text_that_replicas_are_chosen_by(body: Any, dialect: Dialect, text: str) -> None:
    assert found("/generate", body, dialect=dialect).prompt == text
