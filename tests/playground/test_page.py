"""The playground as its user sees it, in a real browser on a real socket."""

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from fastapi import FastAPI
from playwright.sync_api import Page, expect
from torch import Tensor

from tests.checkpoints import byte_tokenizer
from tests.conftest import Loads, serving, wait_until
from tests.fakes import FakeRunner
from tests.playground.conftest import Open

pytestmark = pytest.mark.browser
MakeApp = Callable[..., FastAPI]
PROMPT = "It's a \"test\"\\ of 'quotes'\nand $lines"
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=alert(1)> \x1b[31mred\x1b[0m ‮evil"


def saying(runner: FakeRunner, prompt: str, text: str) -> None:
    """Makes the runner's greedy continuation of the prompt the text."""
    ids, start = byte_tokenizer().encode(text), len(byte_tokenizer().encode(prompt))

    def logits(found: Tensor, slots: Sequence[int]) -> Tensor:
        for row, slot in zip(found, slots, strict=True):
            at = len(runner.held[slot]) - start
            if 0 <= at < len(ids):
                row[:] = 0
                row[ids[at]] = 20.0
        return found

    runner.poison = logits


def column(page: Page, precision: str) -> Any:
    return page.locator(f'.column[data-precision="{precision}"]')


def ask(page: Page, prompt: str, **parameters: object) -> None:
    page.fill("#prompt", prompt)
    page.locator("#sampling").evaluate("details => { details.open = true }")
    for name, value in parameters.items():
        page.get_by_label(name, exact=True).fill(str(value))
    page.click("#run")


def in_flight(app: FastAPI) -> int:
    return int(app.state.service.places.in_flight)


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
        wait_until(lambda: in_flight(app) == 0, 5)
        wait_until(lambda: not any(runner.held for runner in loads.runners.values()))


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
            page.get_by_role("button", name="Use this key").click()
            page.wait_for_timeout(300)
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
        expect(page.locator("#connection")).to_be_hidden(timeout=15_000)
        ask(page, "abc", max_new_tokens=3)
        expect(column(page, "fp32").locator(".phase")).to_have_text("Finished: length")


def test_hostile_output_stays_text(make_app: MakeApp, loads: Loads, open_page: Open) -> None:
    with serving(make_app(precisions="fp32")) as address:
        saying(loads.runners["fp32"], "abc", HOSTILE + "x" * 100)
        page = open_page(address)
        ask(page, "abc", max_new_tokens=220)
        output = column(page, "fp32").locator(".output")
        expect(column(page, "fp32").locator(".phase")).to_have_text("Finished: length")
        text = output.inner_text()
        assert "<script>document.title='owned'</script><img src=x onerror=alert(1)>" in text
        assert "␛[31m" in text
        assert "\x1b" not in text
        assert page.title() == "bitdial playground"
        assert output.locator("script, img").count() == 0
        assert not page.evaluate("document.documentElement.scrollWidth > innerWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_axe_finds_nothing_serious(live: str, open_page: Open, scheme: str, width: int) -> None:
    page = open_page(live, color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    ask(page, "abc", max_new_tokens=5)
    expect(page.locator("#status")).to_contain_text("Finished")
    expect(page.locator("#snippets .snippet")).to_have_count(3)
    found = Axe().run(page).response["violations"]
    assert [(one["id"], one["impact"]) for one in found if one["impact"] in ("serious", "critical")] == []
    assert not page.evaluate("document.documentElement.scrollWidth > innerWidth")


def test_a_precision_is_loaded_and_unloaded(live: str, open_page: Open) -> None:
    page = open_page(live)
    row = page.locator('#precisions tr:has(th:text-is("nf4"))')
    row.get_by_role("button", name="Load nf4").click()
    expect(row.locator(".state")).to_have_text("loaded")
    row.get_by_role("button", name="Unload nf4").click()
    expect(row.locator(".state")).to_have_text("unloaded")
    expect(page.locator(".gauge")).to_contain_text("free for more")


@pytest.mark.parametrize("client", ["curl", "huggingface_hub", "openai"])
def test_the_snippets_run(live: str, open_page: Open, loads: Loads, client: str) -> None:
    saying(loads.runners["fp32"], PROMPT, "zqzzq")
    page = open_page(live)
    ask(page, PROMPT, max_new_tokens=5)
    expect(page.locator("#status")).to_contain_text("Finished")
    code = page.locator(f'.snippet[data-client="{client}"] code').inner_text()
    command = ["bash", "-c", code] if client == "curl" else [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    tokens = re.findall(r'"token":\{[^{}]*"text":"(.)"', done.stdout) if client == "curl" else done.stdout
    assert "".join(tokens) == "zqzzq"
