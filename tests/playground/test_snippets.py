"""The snippets: each client's code gets the answer that the page shows."""

import json
import subprocess
import sys
from collections.abc import Callable

import pytest
from fastapi import FastAPI
from playwright.sync_api import Page, expect

from tests.conftest import Loads, serving, wait_until
from tests.playground.conftest import Open
from tests.playground.pages import answer, ask, finished, set_controls, varying

pytestmark = pytest.mark.browser
MakeApp = Callable[..., FastAPI]
CLIENTS = ("curl", "huggingface_hub", "openai")
PROMPT = "It's a \"test\"\\ of 'quotes'\nand $lines \u202e`x` é"
SAMPLING = {"temperature": 1.5, "top_p": 0.95, "seed": 2**64 - 3, "frequency_penalty": 0.5, "stop": "qq\nzz"}
SET = {
    "complete": {**SAMPLING, "max_new_tokens": 20, "top_k": 20, "repetition_penalty": 1.2, "truncate": 7},
    "chat": {**SAMPLING, "max_tokens": 20, "top_k": 20, "min_p": 0.02, "truncate_prompt_tokens": 50},
}


def code_of(page: Page, client: str) -> str:
    return page.locator(f'.snippet[data-client="{client}"] code').inner_text()


def outputs(page: Page) -> dict[str, str]:
    """What each client's code prints; they run at the same time."""
    codes = {client: code_of(page, client) for client in CLIENTS}
    commands = {
        client: ["bash", "-c", code] if client == "curl" else [sys.executable, "-c", code]
        for client, code in codes.items()
    }
    running = {
        client: subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for client, command in commands.items()
    }
    found = {}
    for client, process in running.items():
        printed, complaint = process.communicate(timeout=60)
        assert process.returncode == 0, complaint
        found[client] = streamed_text(printed) if client == "curl" else printed
    return found


def streamed_text(events: str) -> str:
    texts = []
    for line in events.splitlines():
        data = line.removeprefix("data: ")
        if not data or data == "[DONE]":
            continue
        event = json.loads(data)
        texts.append(
            event["token"]["text"] if "token" in event else event["choices"][0]["delta"].get("content", "")
        )
    return "".join(texts)


@pytest.mark.parametrize("controls", ["default", "set"])
@pytest.mark.parametrize("mode", ["complete", "chat"])
def test_the_snippets_are_the_request_on_screen(
    make_chatty_app: MakeApp, loads: Loads, open_page: Open, mode: str, controls: str
) -> None:
    with serving(app := make_chatty_app()) as address:
        wait_until(lambda: app.state.pool.state("bf16").state == "loaded")
        for key, precision in enumerate(("fp32", "bf16")):
            varying(loads.runners[precision], key)
        page = open_page(address)
        precision = "fp32" if controls == "default" else "bf16"
        if mode == "chat":
            page.get_by_label("Chat", exact=True).check()
        if controls == "set":
            page.get_by_label("fp32", exact=True).uncheck()
            set_controls(page, **SET[mode])
        if (mode, controls) == ("chat", "set"):
            page.locator("#system-part summary").click()
            page.get_by_role("textbox", name="System message").fill("Be\n'brief'.")
        ask(page, PROMPT)
        finished(page)
        shown = answer(page, precision).inner_text()
        assert len(shown) == (20 if controls == "set" else 64)
        assert outputs(page) == dict.fromkeys(CLIENTS, shown)


def test_whatever_makes_the_page_sample_makes_openai_sample(
    make_app: MakeApp, loads: Loads, open_page: Open
) -> None:
    with serving(make_app(precisions="fp32")) as address:
        varying(loads.runners["fp32"], 0)
        page = open_page(address)
        codes, shown = [], []
        for name, value in {"do_sample": True, "top_k": 3, "min_p": 0.6, "top_p": 0.7}.items():
            ask(page, "abc", seed=5, **{name: value})
            finished(page)
            codes.append(code_of(page, "openai"))
            shown.append(answer(page, "fp32").inner_text())
            set_controls(page, **{name: ""})
        together = [sys.executable, "-c", "print()\n".join(codes)]
        done = subprocess.run(together, capture_output=True, text=True, timeout=60)
        assert done.stdout.splitlines() == shown, done.stderr
        assert len(set(shown)) == len(shown)


def test_a_snippet_says_what_its_client_can_not_send(live: str, open_page: Open) -> None:
    page = open_page(live)
    page.fill("#prompt", "abc")
    set_controls(page, min_p=0.1, ignore_eos=True, typical_p=0.5)
    assert "not quite the request on screen: text_generation has no min_p, ignore_eos\n" in code_of(
        page, "huggingface_hub"
    )
    assert "not quite the request on screen: /v1/completions has no typical_p\n" in code_of(page, "openai")
    set_controls(page, min_p="", ignore_eos="", typical_p="")
    for client in CLIENTS:
        expect(page.locator(f'.snippet[data-client="{client}"] code')).not_to_contain_text("not quite")


def test_code_has_no_character_that_a_viewer_obeys(live: str, open_page: Open) -> None:
    page = open_page(live)
    page.fill("#prompt", "ab\u202ec\u2066\u061c")
    for client in CLIENTS:
        code = code_of(page, client)
        assert "\\u202ec\\u2066\\u061c" in code
        assert not set("\u202e\u2066\u061c") & set(code)
