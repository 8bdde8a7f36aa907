"""The panels below the answers, and what a lost connection does to the page's parts."""

import sys
from collections.abc import Callable

import pytest
from fastapi import FastAPI
from playwright.sync_api import Locator, expect

from tests.conftest import serving, wait_until
from tests.playground.conftest import Open
from tests.playground.pages import ask, column, overflows
from tests.routes.test_report_route import FIGURES, keep_report

pytestmark = pytest.mark.browser
MakeApp = Callable[..., FastAPI]
LOST = ("ERR_FAILED",)
# in place of the process that measures: the second of four steps, until it is ended or a line comes in
MEASURING = """
import json, sys
sys.stdin.readline()
step = {"step": 2, "steps": 4, "precision": "nf4", "stage": "scoring", "progress": {"current": 1, "total": 2}}
print(json.dumps({"status": "measuring", **step}), flush=True)
"""
FOREVER, AT_ONCE = MEASURING + "import time; time.sleep(60)", MEASURING + 'print(\'{"kept": ""}\')'


def test_a_precision_is_loaded_and_unloaded(live: str, open_page: Open) -> None:
    page = open_page(live)
    row = page.locator('#precisions tr:has(th:text-is("nf4"))')
    row.get_by_role("button", name="Load nf4").click()
    expect(row.locator(".state")).to_have_text("loaded")
    row.get_by_role("button", name="Unload nf4").click()
    expect(row.locator(".state")).to_have_text("unloaded")
    expect(page.locator(".gauge")).to_contain_text("free for more")


def test_a_connection_lost_while_loading_is_shown_and_the_button_works_again(
    live: str, open_page: Open
) -> None:
    page = open_page(live, expected=LOST)
    row = page.locator('#precisions tr:has(th:text-is("nf4"))')
    expect(row).to_be_visible()
    for address in ("**/stats", "**/precisions/nf4/load"):
        page.route(address, lambda route: route.abort())
    row.get_by_role("button", name="Load nf4").click()
    expect(page.locator("#precisions")).to_contain_text("nf4: The connection to the server failed")
    expect(row.get_by_role("button", name="Load nf4")).to_be_enabled()
    page.unroute_all()
    row.get_by_role("button", name="Load nf4").click()
    expect(row.locator(".state")).to_have_text("loaded")


def test_the_controls_come_when_the_server_does(live: str, open_page: Open) -> None:
    page = open_page(live, expected=("503",))
    page.route("**/openapi.json", lambda route: route.fulfill(status=503, json={"error": "starting"}))
    page.reload()
    expect(page.locator("#parameters")).to_have_text("starting")
    page.unroute_all()
    page.evaluate(
        "document.dispatchEvent(new Event('visibilitychange'))"
    )  # read again as by a tab that is shown
    ask(page, "abc", max_new_tokens=3)
    expect(column(page, "fp32").locator(".phase")).to_have_text("Finished: length")


def test_a_report_is_made_cancelled_and_shown(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, open_page: Open
) -> None:
    def measuring(script: str) -> None:
        monkeypatch.setattr(
            "server.report.background.start_command", lambda *_: [sys.executable, "-c", script]
        )

    with serving(app := make_app()) as address:
        page = open_page(address)
        panel = page.locator("#report")
        status, progress = panel.get_by_role("status"), panel.locator("progress")
        expect(panel).to_contain_text("no report of this model on this host yet")
        measuring(FOREVER)
        panel.get_by_role("button", name="Make a report").press("Enter")
        expect(status).to_have_text("Step 2 of 4: nf4, scoring…")
        expect(progress).to_have_attribute("max", "4")
        assert progress.evaluate("progress => progress.value") == 1.5
        cancel = panel.get_by_role("button", name="Cancel")
        expect(cancel).to_be_focused()
        cancel.press("Enter")
        expect(status).to_contain_text("Cancelled")
        expect(progress).to_be_hidden()
        wait_until(lambda: app.state.default.reports._process is None)
        expect(panel.locator("table, figure")).to_have_count(0)
        measuring(AT_ONCE)
        keep_report(app.state.default.reports)
        panel.get_by_role("button", name="Make a report").click()
        expect(status).to_have_text("Finished.")
        expect(panel).to_contain_text("Run bf16: 2.0 × smaller")
        expect(panel.locator("tbody th")).to_have_text(list(FIGURES))
        expect(panel.locator("tbody tr").nth(2)).to_contain_text("600 B")
        for width, drawn in ((1280, "680"), (400, "376")):
            page.set_viewport_size({"width": width, "height": 900})
            expect(panel.locator("figure svg")).to_have_attribute("width", drawn)
            see_plot(panel.locator("figure svg"))
            assert not overflows(page)


def see_plot(drawing: Locator) -> None:
    """Axes with units and ticks, and the points where their figures say: less memory left, more KL up."""
    name = "Mean KL divergence (nats per token) over Weights (kB) of 3 precisions"
    expect(drawing).to_have_accessible_name(name)
    texts = drawing.locator("text").all_text_contents()
    assert {
        "Weights (kB)",
        "Mean KL divergence (nats per token)",
        "0",
        "4",
        "<10⁻⁶",
        "10⁻²",
        *FIGURES,
    } <= set(texts)
    points = [
        (float(point.get_attribute("cx") or 0), float(point.get_attribute("cy") or 0))
        for point in drawing.locator("circle").all()
    ]
    (fp32, fp32_kl), (bf16, bf16_kl), (nf4, nf4_kl) = points
    assert nf4 < bf16 < fp32
    assert nf4_kl < bf16_kl < fp32_kl
    boxes = [text.bounding_box() for text in drawing.locator("text").all()]
    around = drawing.bounding_box()
    assert around is not None
    for box in boxes:
        assert box is not None
        assert around["x"] <= box["x"] <= box["x"] + box["width"] <= around["x"] + around["width"]
