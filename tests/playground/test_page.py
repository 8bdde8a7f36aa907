"""The playground as its user sees it, in a real browser on a real socket."""

import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from fastapi import FastAPI
from playwright.sync_api import Page, Route, expect

from tests.conftest import PATIENCE, Loads, serving, wait_until
from tests.playground.conftest import Open
from tests.playground.pages import answer, ask, column, finished, in_flight, overflows, saying
from tests.routes.test_report_route import keep_report

pytestmark = pytest.mark.browser
MakeApp = Callable[..., FastAPI]
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=alert(1)> \x1b[31mred\x1b[0m "


def test_answers_stream_side_by_side_and_diverge(make_app: MakeApp, loads: Loads, open_page: Open) -> None:
    with serving(app := make_app()) as address:
        wait_until(lambda: app.state.pool.state("bf16").state == "loaded")
        saying(loads.runners["fp32"], "abc", "qqzzqz")
        saying(loads.runners["bf16"], "abc", "qqzqzz")
        page = open_page(address)
        ask(page, "abc", max_new_tokens=6)
        for precision, text in (("fp32", "qqzzqz"), ("bf16", "qqzqzz")):
            expect(column(page, precision).locator(".output")).to_have_text(text)
            expect(column(page, precision).locator(".phase")).to_have_text("Finished: length")
        expect(column(page, "bf16").locator(".token.first")).to_have_text("q")
        expect(column(page, "bf16")).to_contain_text("token 4")
        expect(column(page, "fp32").locator(".token.first")).to_have_count(0)
        expect(page.locator("#status")).to_contain_text("Finished")


def test_run_pressed_before_the_precisions_are_known_waits_for_them(live: str, open_page: Open) -> None:
    page, release = open_without_stats(live, open_page)
    ask_at_once(page)
    expect(page.locator("#run")).to_be_disabled()
    release()
    finished(page)
    assert len(answer(page, "fp32").inner_text()) == len(answer(page, "bf16").inner_text()) > 0


def test_run_that_waits_for_precisions_is_stopped(live: str, open_page: Open) -> None:
    page, release = open_without_stats(live, open_page)
    ask_at_once(page)
    page.click("#stop")
    expect(page.locator("#status")).to_have_text("Stopped.")
    expect(page.locator("#run")).to_be_enabled()
    release()
    expect(page.get_by_label("fp32", exact=True)).to_be_checked()
    expect(page.locator("#status")).to_have_text("Stopped.")
    assert page.locator(".column").count() == 0


def test_run_pressed_while_the_first_precision_is_loading_waits_for_it(
    make_app: MakeApp, loads: Loads, open_page: Open
) -> None:
    loadable = threading.Event()
    with serving(app := make_app(precisions="fp32")) as address:
        httpx.post(f"{address}/precisions/fp32/unload", timeout=PATIENCE).raise_for_status()
        loads.prepare = lambda runner: wait_until(loadable.is_set)
        threading.Thread(target=httpx.post, args=(f"{address}/precisions/fp32/load",)).start()
        wait_until(lambda: app.state.pool.state("fp32").state == "loading")
        page = open_page(address)
        expect(page.get_by_label("fp32", exact=True)).to_be_visible()
        ask_at_once(page)
        loadable.set()
        finished(page)
        assert len(answer(page, "fp32").inner_text()) > 0


def open_without_stats(address: str, open_page: Open) -> tuple[Page, Callable[[], None]]:
    """A page whose readings of the statistics wait for a call of the function."""
    held: list[Route] = []
    released = False
    page = open_page(address, query="favicon.ico")
    page.route("**/stats*", lambda route: route.continue_() if released else held.append(route))
    page.goto(address)
    while not held:
        page.wait_for_timeout(20)

    def release() -> None:
        nonlocal released
        released = True
        for route in held:
            route.continue_()

    return page, release


def ask_at_once(page: Page) -> None:
    page.fill("#prompt", "abc")
    page.click("#run")
    expect(page.locator("#status")).to_have_text("Waiting for a precision to be loaded…")


def test_what_is_typed_while_the_page_is_loading_is_kept(live: str, open_page: Open) -> None:
    held: list[Route] = []
    page = open_page(live, query="favicon.ico")
    page.route("**/playground/state.js", lambda route: held.append(route))
    page.goto(live, wait_until="commit")
    page.fill("#prompt", "abc")
    expect(page.locator("#run")).to_be_disabled()
    while not held:
        page.wait_for_timeout(20)
    held[0].continue_()
    page.click("#run")
    finished(page)
    expect(page.locator("#prompt")).to_have_value("abc")
    assert page.evaluate("Object.values(sessionStorage).map(kept => JSON.parse(kept).prompt)") == ["abc"]


@pytest.mark.parametrize("leave", [lambda page: page.click("#stop"), lambda page: page.close()])
def test_stopping_and_closing_the_tab_free_the_places(
    make_app: MakeApp, loads: Loads, open_page: Open, leave: Callable[[Page], None]
) -> None:
    with serving(app := make_app()) as address:
        wait_until(lambda: app.state.pool.state("bf16").state == "loaded")
        for runner in loads.runners.values():
            runner.delay = 0.05
        page = open_page(address)
        ask(page, "abc", max_new_tokens=200)
        wait_until(lambda: in_flight(app) == 2)
        leave(page)
        wait_until(lambda: in_flight(app) == 0)
        wait_until(lambda: not any(runner.held for runner in loads.runners.values()))
        assert all(len(runner.batches) < 190 for runner in loads.runners.values())  # of 200


def test_an_error_is_shown_as_the_api_says_it(live: str, open_page: Open) -> None:
    page = open_page(live, expected=("422",))
    ask(page, "abc", temperature=-1)
    expect(column(page, "fp32").get_by_role("alert")).to_contain_text("greater than 0")


def test_a_key_is_asked_for_and_kept_in_no_storage(make_app: MakeApp, open_page: Open) -> None:
    with serving(make_app(api_key="secret-key")) as address:
        page = open_page(address, expected=("401",))
        for key in ("wrong", "secret-key"):
            expect(page.locator("#key-dialog")).to_be_visible()
            page.fill("#key", key)
            with page.expect_response("**/*"):
                page.get_by_role("button", name="Use this key").click()
        expect(page.locator("#key-dialog")).to_be_hidden()
        ask(page, "abc", max_new_tokens=3)
        expect(column(page, "fp32").locator(".phase")).to_have_text("Finished: length")
        kept = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
        assert "abc" in kept
        assert "secret-key" not in kept


def test_it_survives_a_reload_and_a_restarted_server(
    make_app: MakeApp, browser: Any, open_page: Open
) -> None:
    with serving(make_app()) as address:
        page = open_page(address, expected=("ERR_CONNECTION_REFUSED", "Failed to fetch", "ERR_"))
        page.fill("#prompt", "kept text")
        page.reload()
        expect(page.locator("#prompt")).to_have_value("kept text")
        expect(page.locator("#precisions tbody tr").first).to_be_visible()
    ask(page, "abc", max_new_tokens=3)
    expect(page.locator("#connection")).to_be_visible()
    port = int(address.rpartition(":")[2])
    with serving(make_app(), port=port):
        expect(page.locator("#connection")).to_be_hidden()
        ask(page, "abc", max_new_tokens=3)
        expect(column(page, "fp32").locator(".phase")).to_have_text("Finished: length")


def test_hostile_output_stays_text(make_app: MakeApp, loads: Loads, open_page: Open) -> None:
    with serving(make_app(precisions="fp32")) as address:
        saying(loads.runners["fp32"], "abc", HOSTILE + "x" * 100)
        page = open_page(address)
        ask(page, "abc", max_new_tokens=220)
        output = answer(page, "fp32")
        expect(column(page, "fp32").locator(".phase")).to_have_text("Finished: length")
        text = output.inner_text()
        assert "<script>document.title='owned'</script><img src=x onerror=alert(1)>" in text
        assert "␛[31m" in text
        assert "\x1b" not in text
        assert page.title() == "bitdial playground"
        assert output.locator("script, img").count() == 0
        for width in (1280, 400):
            page.set_viewport_size({"width": width, "height": 900})
            assert not overflows(output)
            assert not overflows(page)


def faults(page: Page) -> list[tuple[str, str]]:
    found = Axe().run(page).response["violations"]
    return [(one["id"], one["impact"]) for one in found if one["impact"] in ("serious", "critical")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_axe_finds_nothing_serious(
    make_chatty_app: MakeApp, loads: Loads, open_page: Open, scheme: str, width: int
) -> None:
    with serving(app := make_chatty_app()) as address:
        wait_until(lambda: app.state.pool.state("bf16").state == "loaded")
        saying(loads.runners["bf16"], "abc", "\u200e?")
        keep_report(app.state.default.reports)
        page = open_page(address, color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 900})
        ask(page, "abc", max_new_tokens=5)
        finished(page)
        expect(column(page, "bf16").locator(".token.first")).to_be_visible()
        expect(page.locator("#report circle")).to_have_count(3)
        expect(page.locator("#snippets .snippet")).to_have_count(3)
        assert faults(page) == []
        page.get_by_label("Chat", exact=True).check()
        page.locator("#system-part summary").click()
        ask(page, "abc")
        finished(page)
        assert faults(page) == []
        assert not overflows(page)
