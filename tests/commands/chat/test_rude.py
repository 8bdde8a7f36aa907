"""`bitdial chat` with input that is no text, servers that are none, and proxies that can't be used."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.commands.chat.conftest import Talk
from tests.commands.chat.test_conversation import answer

TalkTo = Callable[..., Talk]


@pytest.fixture
def url(serve: Callable[..., str], template: Path) -> str:
    return serve(chat_template=template)


def test_a_line_that_is_not_utf_8_is_an_error_of_its_own(url: str, talk: TalkTo) -> None:
    done = talk(b"\xff\xfe", "hello", url=url, max_new_tokens=6)
    assert done == Talk(f"{answer(url, 'hello')}\n", "bitdial chat: the message is not UTF-8\n", 1)


def test_a_system_message_that_is_not_utf_8_is_one_line(url: str, talk: TalkTo) -> None:
    done = talk("hello", url=url, system="\udcff")
    assert (done.out, done.code) == ("", 2)
    assert done.err.startswith("bitdial chat: --system: ")
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "x"])
def test_a_temperature_that_is_none_is_refused(url: str, talk: TalkTo, value: str) -> None:
    done = talk(f"/set temperature {value}", "hello", url=url, max_new_tokens=6)
    assert "bitdial chat: temperature: " in done.err
    assert done.out == f"{answer(url, 'hello')}\n"


def test_a_proxy_that_can_not_be_used_is_one_line(talk: TalkTo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks9://127.0.0.1:1")
    done = talk("hello", url="http://127.0.0.1:1")
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert "socks9" in done.err


def test_what_a_server_says_of_itself_and_its_errors_cannot_move_the_cursor(talk: TalkTo) -> None:
    class Rude(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"error": "\x1b[2J\x07no", "error_type": "unavailable"}).encode()
            self.send_response(503)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Rude) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        done = talk("hello", url=f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert done == Talk("", "bitdial chat: �[2J�no\n", 1)
