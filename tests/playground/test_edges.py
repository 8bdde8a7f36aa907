"""The page at its edges: behind a path prefix, and with text and numbers that are out of the ordinary."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from playwright.sync_api import Page, expect
from starlette.types import Receive, Scope, Send

from tests.conftest import Loads, serving, wait_until
from tests.playground.conftest import Open
from tests.playground.pages import answer, ask, column, finished, overflows, saying, set_controls
from tests.playground.test_snippets import CLIENTS, outputs

pytestmark = pytest.mark.browser
MakeApp = Callable[..., FastAPI]
BIDI = {
    control: f"⟨U+{ord(control):04X}⟩"
    for control in "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
}


class Prefixed:
    """The app behind a proxy that removes a path prefix, and knows no other path."""

    def __init__(self, app: FastAPI, prefix: str) -> None:
        self._app, self._prefix = app, prefix

    @property
    def state(self) -> Any:
        return self._app.state  # replaced as the app starts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"]
            inside = path.startswith(f"{self._prefix}/")
            scope = {**scope, "path": path.removeprefix(self._prefix) if inside else "/outside-the-prefix"}
        await self._app(scope, receive, send)


def test_the_page_and_its_snippets_work_behind_a_path_prefix(
    make_chatty_app: MakeApp, open_page: Open
) -> None:
    app: Any = Prefixed(make_chatty_app(precisions="fp32"), "/some/where")
    with serving(app) as address:
        page = open_page(f"{address}/some/where")
        for mode in ("Complete", "Chat"):
            page.get_by_label(mode, exact=True).check()
            ask(page, "abc")
            finished(page)
            shown = answer(page, "fp32").inner_text()
            assert len(shown) == 64
            assert outputs(page) == dict.fromkeys(CLIENTS, shown)
        expect(page.locator("#precisions tbody tr").first).to_be_visible()
        expect(page.locator("#report")).to_contain_text("no report")


@pytest.mark.parametrize("tokens", [1, 2000])
def test_a_hundred_thousand_characters_without_a_blank(live: str, open_page: Open, tokens: int) -> None:
    body = stream("x" * (100_000 // tokens), tokens)
    page = open_page(live)
    page.route("**/generate_stream", lambda it: it.fulfill(content_type="text/event-stream", body=body))
    page.get_by_label("bf16", exact=True).uncheck()
    ask(page, "abc")
    finished(page)
    output = answer(page, "fp32")
    assert output.evaluate("element => element.textContent.length") == 100_000
    expect(column(page, "fp32")).to_contain_text(f"Tokens{tokens}")
    for width in (1280, 400):
        page.set_viewport_size({"width": width, "height": 900})
        output.press("End")
        expect(page.locator("#inspector")).to_be_visible()
        assert not overflows(output)
        assert not overflows(page)


def stream(text: str, tokens: int) -> str:
    """The server-sent events of so many tokens of this text."""
    token = {"id": 65, "text": text, "logprob": -0.5, "special": False}
    last = {"details": {"finish_reason": "length"}, "generated_text": text * tokens}
    events = [{"token": token, "details": None} for _ in range(tokens - 1)] + [{"token": token, **last}]
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events)


def test_whatever_turns_the_reading_direction_is_visible(
    make_app: MakeApp, loads: Loads, open_page: Open
) -> None:
    with serving(app := make_app()) as address:
        wait_until(lambda: app.state.pool.state("bf16").state == "loaded")
        sent = "a".join(BIDI)
        saying(loads.runners["fp32"], "abc", sent)
        page = open_page(address)
        ask(page, "abc", max_new_tokens=len(sent.encode()))
        finished(page)
        expect(answer(page, "fp32")).to_have_text("a".join(BIDI.values()))
        seen = page.locator("main").evaluate("main => main.innerHTML")
        assert not set(BIDI) & set(seen)


def test_the_first_divergence_is_named_as_it_is_shown(
    make_app: MakeApp, loads: Loads, open_page: Open
) -> None:
    with serving(app := make_app()) as address:
        wait_until(lambda: app.state.pool.state("bf16").state == "loaded")
        saying(loads.runners["fp32"], "abc", "zq")
        saying(loads.runners["bf16"], "abc", "z\x1b")
        page = open_page(address)
        ask(page, "abc", max_new_tokens=2)
        expect(column(page, "bf16").locator(".token.first")).to_have_attribute(
            "aria-label", "first divergence: ␛"
        )


def test_a_seed_is_sent_to_its_last_digit(live: str, open_page: Open) -> None:
    page = open_page(live)
    for seed in ("9007199254740993", "18446744073709551615"):
        set_controls(page, seed=seed, max_new_tokens=2)
        assert f'"seed":{seed},' in sent_by(page)
    page.reload()
    expect(page.get_by_label("seed", exact=True)).to_have_value(seed)
    assert f'"seed":{seed},' in sent_by(page)
    expect(page.locator("#status")).to_contain_text(f"Seed {seed}.")


def test_a_seed_that_is_too_large_is_refused_by_the_api(live: str, open_page: Open) -> None:
    page = open_page(live, expected=("422",))
    ask(page, "abc", seed=2**64)
    expect(column(page, "fp32").get_by_role("alert")).to_contain_text("seed")


def sent_by(page: Page) -> str:
    """The body of the request that the page sends to run."""
    with page.expect_request("**/generate_stream") as asked:
        ask(page, "abc")
    finished(page)
    return asked.value.post_data or ""
