import json
import zlib

import pytest
from starlette.testclient import TestClient

from server.errors import BadRequest
from server.http.body import parse_object
from tests.routes.test_generate import PROMPT, greedy

BODY = json.dumps({"inputs": PROMPT, "max_new_tokens": 2}).encode()


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate, gzip"])
def test_compressed_bodies_are_refused_by_name(client: TestClient, encoding: str) -> None:
    headers = {"content-type": "application/json", "content-encoding": encoding}
    reply = client.post("/generate", content=zlib.compress(BODY), headers=headers)
    assert reply.status_code == 415
    assert "compressed" in reply.json()["error"]


@pytest.mark.parametrize(
    "headers",
    [{"content-type": "application/json; charset=utf-8"}, {"content-type": "application/ld+json"},
     {"content-type": "APPLICATION/JSON", "content-encoding": "identity"}, {}],
)  # fmt: skip
def test_plain_json_by_any_of_its_names(client: TestClient, headers: dict[str, str]) -> None:
    reply = client.post("/generate", content=BODY, headers=headers)
    assert reply.json()["generated_text"] == greedy(2)


@pytest.mark.parametrize(
    "raw", [b'{"a": -Infinity}', b'{"a": -1e400}', b'\xef\xbb\xbf{"a": 1}', b"{'a': 1}", b"1"]
)
def test_bodies_that_are_not_objects(raw: bytes) -> None:
    with pytest.raises(BadRequest):
        parse_object(raw)


def test_an_object() -> None:
    assert parse_object('{"a": [1, 2.5, null, "é"]}'.encode()) == {"a": [1, 2.5, None, "é"]}
