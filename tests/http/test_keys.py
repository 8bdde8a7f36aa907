"""Keys in the wrong places: paths, queries, ids and logs; and keys that no header can carry."""

import itertools
import json
import logging
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError
from starlette.testclient import TestClient

from server.__main__ import main
from server.http.redaction import REDACTED, Redaction
from server.observability.logs import JsonFormatter, RedactingFormatter
from server.settings.server import Settings
from tests.conftest import serving
from tests.http.connection.test_slow_clients import connected, received, status_of

KEY, ADMIN = "s3cret-Key/with+signs=", "the-administrator's"
BEARER = {"Authorization": f"Bearer {KEY}"}
PERCENT = "".join(f"%{byte:02x}" for byte in KEY.encode())
TWICE = PERCENT.replace("%", "%25")
IN_FULL = {KEY, ADMIN, PERCENT, TWICE}


@pytest.fixture
def secured(make_client: Callable[..., TestClient]) -> TestClient:
    return make_client(api_key=KEY, admin_api_key=ADMIN)


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.name.startswith(("server", "uvicorn"))]


PATHS = [
    f"/{KEY}", f"/{PERCENT}", f"/{TWICE}", f"/models/{KEY}/generate", f"/precisions/{PERCENT}/load",
    f"/v1/models/{KEY}", f"/{ADMIN}", f"/prefix-{KEY}-suffix", "/" + "a" * 190 + KEY,
]  # fmt: skip


def test_a_key_in_a_path_is_in_no_log(secured: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for method, path, headers in itertools.product(("GET", "POST"), PATHS, ({}, BEARER)):
        caplog.clear()
        assert secured.request(method, path, headers=headers).status_code >= 400
        access = [one.getMessage() for one in caplog.records if one.name == "server.access"]
        assert len(access) == 1
        assert "[redacted" in access[0], path
        assert not [line for line in logged(caplog) if any(key[:12] in line for key in IN_FULL)], path


def test_a_key_as_id_method_or_other_header_is_in_no_log(
    make_app: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    key = "0123456789-secret"
    with serving(make_app(api_key=key)) as address, connected(address) as connection:
        connection.sendall(
            f"{key} /health/live HTTP/1.1\r\nHost: x\r\nX-Request-ID: {key}\r\nReferer: http://x/?{key}\r\n"
            f"Cookie: key={key}\r\nUser-Agent: {key}\r\nConnection: close\r\n\r\n".encode()
        )
        reply = received(connection)
        assert status_of(reply) == 405
        assert key.encode() not in reply
    assert [line for line in logged(caplog) if "/health/live" in line]
    assert not [line for line in logged(caplog) if key in line]


IN_QUERY = [
    KEY, PERCENT, TWICE, f"{KEY}=", f"{PERCENT}=1", f"x={KEY}", f"x=Bearer%20{PERCENT}",
    f"x=Bearer+{PERCENT}", f"x=a{PERCENT}b", f"a=1&x={PERCENT}",
    f"a=1;x={KEY}", f"x={ADMIN}", f"precision=fp32&{PERCENT}",
]  # fmt: skip
NAMES = [
    "api_key", "api_key=", "api_key=wrong", "API-Key=x", "apikey", "%61pi_key", "key=x", "token",
    "access_token=x", "auth=x", "authorization=x", "Bearer=x", "bearer", "x-api-key=x", "hf_token=x",
]  # fmt: skip


def test_a_key_in_the_query_is_refused_despite_a_valid_header(
    secured: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for query, key in itertools.product([*IN_QUERY, *NAMES], (KEY, ADMIN)):
        reply = secured.get(f"/v1/models?{query}", headers={"Authorization": f"Bearer {key}"})
        assert reply.status_code == 401, query
        assert "not in the address" in reply.json()["error"]["message"]
    assert not [line for line in logged(caplog) if any(key in line for key in IN_FULL)]


def test_other_queries_pass(secured: TestClient) -> None:
    for query in ("", "x", "precision=fp32", "keys=1", "tokens=5", "x=key", "a=%ff", "%", f"x={KEY[:-1]}"):
        assert secured.get(f"/v1/models?{query}", headers=BEARER).status_code == 200, query


def test_a_short_key_does_not_spoil_words_that_it_is_a_part_of(
    make_client: Callable[..., TestClient], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    client = make_client(api_key="a")
    bearer = {"Authorization": "Bearer a"}
    assert client.get("/stats?layers=false&x=ab", headers=bearer).status_code == 200
    assert client.get("/stats?x=a", headers=bearer).status_code == 401
    assert '"/stats"' in logged(caplog)[-1]


@pytest.mark.parametrize("key", ["cl\xe9", "a b", '\xff~!"\\'])
def test_a_key_beyond_ascii_may_come_in_either_encoding(
    make_client: Callable[..., TestClient], key: str
) -> None:
    client = make_client(api_key=key)
    for encoding in ("utf-8", "latin-1"):
        sent = [(b"authorization", b"Bearer " + key.encode(encoding))]
        assert client.get("/v1/models", headers=sent).status_code == 200
    assert client.get("/v1/models", headers=[(b"authorization", b"Bearer cl")]).status_code == 401


UNUSABLE = [
    (" ", "blank"), ("\t", "blank"), ("a\n", "line break"), ("a\nb", "line break"), ("a\x00b", "control"),
    ("a\x85b", "control"), (" a", "space"), ("a ", "space"), ("日本", "Latin-1"), ("a\udce9", "Latin-1"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "reason"), UNUSABLE)
@pytest.mark.parametrize("name", ["api_key", "admin_api_key"])
def test_a_key_that_no_header_can_carry_is_refused(name: str, key: str, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Settings(**{name: key})  # type: ignore[arg-type]


def test_an_unusable_key_is_one_line_that_does_not_show_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("API_KEY", "hidden\nline")
    assert main(["serve"]) == 2
    printed = capsys.readouterr().err
    assert re.fullmatch(r"bitdial serve: --api-key \(or API_KEY\): it has a line break .*\n", printed)
    assert "hidden" not in printed


def test_no_log_line_shows_a_key_wherever_it_is_in_a_record() -> None:
    key = 'long "quoted" secret'
    try:
        raise RuntimeError(f"about {key}")
    except RuntimeError:
        record = logging.LogRecord("server", logging.ERROR, "", 1, "for %s", (key,), sys.exc_info())
    record.fields = {"path": f"/{key}", "model": "gpt2"}
    plain = RedactingFormatter(logging.Formatter("%(message)s"), [key]).format(record)
    assert plain.startswith(f"for {REDACTED}\n")
    as_json = RedactingFormatter(JsonFormatter(), [key]).format(record)
    assert json.loads(as_json)["path"] == f"/{REDACTED}"
    assert json.loads(as_json)["model"] == "gpt2"
    for line in (plain, as_json):
        assert "secret" not in line


def test_without_a_key_nothing_is_redacted() -> None:
    nothing = Redaction(())
    assert nothing("/a/b") == nothing.address("/a/b") == "/a/b"
    assert not nothing.is_in(b"")
