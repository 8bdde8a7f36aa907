"""The playground of a server with two models: one of them at a time, in all parts of the page."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from playwright.sync_api import Locator, Page, Route, expect

from tests.conftest import serving, wait_until
from tests.playground.conftest import Open
from tests.playground.pages import answer, ask, finished, overflows
from tests.playground.test_page import faults
from tests.playground.test_panels import FOREVER
from tests.playground.test_snippets import CLIENTS, code_of, outputs
from tests.routes.openai.test_openai import TEMPLATE
from tests.routes.test_report_route import keep_report
from tests.two_models import Runners, is_ready, two_models

pytestmark = pytest.mark.browser


@pytest.fixture
def runners() -> Runners:
    return {}


@pytest.fixture
def app(tmp_path: Path, runners: Runners) -> FastAPI:
    """Two models, of which the small one can chat."""
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    return two_models(tmp_path, runners, {"chat_template": template})


@pytest.fixture
def address(app: FastAPI) -> Iterator[str]:
    with serving(app) as found:
        wait_until(lambda: is_ready(app))
        yield found


def chooser(page: Page) -> Locator:
    return page.get_by_label("Model", exact=True)


def about(page: Page, model: str) -> None:
    expect(page.locator("#model")).to_have_text(re.compile(f"^{model}: "))


def test_one_model_needs_no_chooser(live: str, open_page: Open) -> None:
    page = open_page(live)
    about(page, "fake")
    expect(chooser(page)).to_be_hidden()


def test_answers_precisions_and_figures_are_those_of_the_chosen_model(address: str, open_page: Open) -> None:
    page = open_page(address)
    about(page, "large")
    expect(chooser(page).locator("option")).to_have_text(["large", "owner/small"])
    expect(page.get_by_label("bf16", exact=True)).to_be_checked()
    ask(page, "xyz", max_new_tokens=4)
    finished(page)
    expect(answer(page, "fp32")).to_have_text("aaaa")
    chooser(page).select_option("owner/small")
    about(page, "owner/small")
    expect(page.locator(".column")).to_have_count(0)  # of the other model
    expect(page.get_by_label("fp32", exact=True)).to_be_checked()
    expect(page.get_by_label("bf16", exact=True)).not_to_be_checked()  # it is not loaded
    expect(page.locator("#prompt")).to_have_value("xyz")
    ask(page, "xyz")
    finished(page)
    expect(answer(page, "fp32")).to_have_text("bbbb")
    row = page.locator('#precisions tr:has(th:text-is("bf16"))')
    row.get_by_role("button", name="Load bf16").click()
    expect(row.locator(".state")).to_have_text("loaded")
    expect(page.locator(".gauge")).to_contain_text("Memory of all models")
    chooser(page).select_option("large")
    about(page, "large")
    row.get_by_role("button", name="Unload bf16").click()
    expect(row.locator(".state")).to_have_text("unloaded")
    chooser(page).select_option("owner/small")
    expect(row.locator(".state")).to_have_text("loaded")


def test_the_address_leads_to_the_model_and_a_reload_keeps_it(address: str, open_page: Open) -> None:
    page = open_page(address)
    about(page, "large")
    chooser(page).select_option("owner/small")
    about(page, "owner/small")
    assert page.url == f"{address}/?model=owner%2Fsmall"
    page.reload()
    about(page, "owner/small")
    expect(chooser(page)).to_have_value("owner/small")
    about(open_page(address, query="?model=small"), "owner/small")
    chooser(page).select_option("large")
    about(page, "large")
    assert page.url == f"{address}/"


def test_a_link_to_a_model_that_is_not_there_leads_to_the_default_one(address: str, open_page: Open) -> None:
    page = open_page(address, expected=("404",), query="?model=medium")
    about(page, "large")
    expect(page.locator("#status")).to_have_text("There is no model medium here: this is the default one.")
    assert page.url == f"{address}/"
    expect(page.locator("#connection")).to_be_hidden()


def test_the_snippets_ask_the_chosen_model(address: str, open_page: Open) -> None:
    page = open_page(address)
    about(page, "large")
    chooser(page).select_option("owner/small")
    about(page, "owner/small")
    ask(page, "xyz", max_new_tokens=5)
    finished(page)
    expect(answer(page, "fp32")).to_have_text("bbbbb")
    assert outputs(page) == dict.fromkeys(CLIENTS, "bbbbb")
    page.get_by_label("Chat", exact=True).check()
    ask(page, "xyz", max_tokens=3)
    finished(page)
    assert outputs(page) == dict.fromkeys(CLIENTS, "bbb")
    assert "owner/small:fp32" in code_of(page, "openai")


def test_a_conversation_goes_on_with_another_model(address: str, open_page: Open) -> None:
    page = open_page(address, query="?model=small")
    about(page, "owner/small")
    page.get_by_label("Chat", exact=True).check()
    ask(page, "first", max_tokens=3)
    finished(page)
    page.fill("#prompt", "second")
    chooser(page).focus()
    chooser(page).press("ArrowUp")
    about(page, "large")
    expect(chooser(page)).to_be_focused()
    expect(page.get_by_label("Chat", exact=True)).to_be_disabled()  # it has no chat template
    expect(page.locator("#prompt")).to_have_value("second")
    chooser(page).press("ArrowDown")
    about(page, "owner/small")
    page.get_by_label("Chat", exact=True).check()
    expect(page.locator(".turn p")).to_have_text(["first", "bbb"])


def test_a_report_that_is_made_is_of_the_model_it_was_begun_with(
    app: FastAPI, address: str, open_page: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.report.background.start_command", lambda *_: [sys.executable, "-c", FOREVER])
    keep_report(app.state.default.reports)
    page = open_page(address)
    panel = page.locator("#report")
    expect(panel.locator("tbody tr")).to_have_count(3)
    chooser(page).select_option("owner/small")
    expect(panel).to_contain_text("POST /report?model=owner/small")
    expect(panel.locator("tbody tr")).to_have_count(0)
    panel.get_by_role("button", name="Make a report").click()
    status = panel.get_by_role("status")
    expect(status).to_have_text("owner/small: Step 2 of 4: nf4, scoring…")
    assert app.state.models["owner/small"].reports._process is not None
    chooser(page).select_option("large")
    expect(panel.locator("tbody tr")).to_have_count(3)
    expect(status).to_contain_text("owner/small: Step 2")
    panel.get_by_role("button", name="Cancel").click()
    expect(status).to_contain_text("owner/small: Cancelled")


def test_late_answers_about_another_model_are_not_shown(address: str, open_page: Open) -> None:
    page = open_page(address)
    about(page, "large")
    held: list[Route] = []
    page.route("**/stats", lambda route: held.append(route))  # the default model's alone: others have a query
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    while not held:
        page.wait_for_timeout(20)
    chooser(page).select_option("owner/small")
    about(page, "owner/small")
    with page.expect_response("**/stats"):
        for route in held:
            route.continue_()
    page.wait_for_timeout(200)
    about(page, "owner/small")
    expect(chooser(page)).to_have_value("owner/small")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_axe_finds_nothing_serious_and_nothing_is_cut(
    address: str, open_page: Open, scheme: str, width: int
) -> None:
    page = open_page(address, color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    chooser(page).select_option("owner/small")
    about(page, "owner/small")
    ask(page, "abc", max_new_tokens=5)
    finished(page)
    assert faults(page) == []
    assert not overflows(page)
