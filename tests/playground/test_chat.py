"""A conversation: its system message, and the times beside its answers."""

from collections.abc import Callable

import pytest
from fastapi import FastAPI
from playwright.sync_api import expect

from tests.conftest import Loads, serving, wait_until
from tests.playground.conftest import Open
from tests.playground.pages import answer, ask, column, finished, in_flight, saying, set_controls

pytestmark = pytest.mark.browser
MakeApp = Callable[..., FastAPI]


def test_the_system_message_is_the_first(make_chatty_app: MakeApp, loads: Loads, open_page: Open) -> None:
    with serving(make_chatty_app(precisions="fp32")) as address:
        page = open_page(address)
        expect(page.locator("#system-part")).to_be_hidden()
        page.get_by_label("Chat", exact=True).check()
        field = page.get_by_role("textbox", name="System message")
        expect(field).to_be_hidden()
        page.locator("#system-part summary").click()
        field.fill("Be brief.")
        saying(loads.runners["fp32"], "system: Be brief.\nuser: Hi\nassistant:", "zq")
        ask(page, "Hi", max_tokens=2)
        finished(page)
        expect(answer(page, "fp32")).to_have_text("zq")
        for client in ("curl", "huggingface_hub", "openai"):
            expect(page.locator(f'.snippet[data-client="{client}"] code')).to_contain_text("Be brief.")
        page.get_by_role("button", name="Continue with this answer").click()
        told = "system: Be brief.\nuser: Hi\nassistant: zq\nuser: more\nassistant:"
        saying(loads.runners["fp32"], told, "qq")
        ask(page, "more")
        finished(page)
        expect(answer(page, "fp32")).to_have_text("qq")
        page.reload()
        expect(field).to_have_value("Be brief.")
        field.fill("  ")
        page.click("#clear")
        saying(loads.runners["fp32"], "user: Hi\nassistant:", "zz")
        ask(page, "Hi")
        finished(page)
        expect(answer(page, "fp32")).to_have_text("zz")


@pytest.mark.parametrize("logprobs", [True, False])
def test_the_first_divergence_of_a_chat(
    make_chatty_app: MakeApp, loads: Loads, open_page: Open, logprobs: bool
) -> None:
    with serving(app := make_chatty_app()) as address:
        wait_until(lambda: app.state.pool.state("bf16").state == "loaded")
        saying(loads.runners["fp32"], "user: Hi\nassistant:", "zé qz")
        saying(loads.runners["bf16"], "user: Hi\nassistant:", "zé zz")
        page = open_page(address)
        page.get_by_label("Chat", exact=True).check()
        set_controls(page, logprobs=logprobs)
        ask(page, "Hi", max_tokens=6)
        finished(page)
        for precision in ("fp32", "bf16"):
            expect(column(page, precision)).to_contain_text("Tokens6")
        expect(column(page, "bf16")).to_contain_text("First divergencetoken 5")


def test_the_times_of_a_chat_are_the_servers(make_chatty_app: MakeApp, loads: Loads, open_page: Open) -> None:
    with serving(app := make_chatty_app(precisions="fp32")) as address:
        page = open_page(address)
        page.get_by_label("Chat", exact=True).check()
        loads.runners["fp32"].delay = 0.05
        ask(page, "Hi", max_tokens=200)
        figures = column(page, "fp32").locator("dl")
        expect(figures).to_contain_text("tokens/s in this tab")
        page.click("#stop")
        expect(figures).to_contain_text(
            "tokens/s in this tab"
        )  # of an answer that has no end the server tells none
        expect(page.locator("#bars")).to_contain_text("larger is better, in this tab")
        wait_until(lambda: in_flight(app) == 0)
        ask(page, "Hi", max_tokens=4)
        finished(page)
        expect(figures).to_contain_text("tokens/s")
        expect(figures).not_to_contain_text("in this tab")
        expect(page.locator("#bars")).not_to_contain_text("in this tab")
