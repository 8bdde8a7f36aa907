"""A real headless browser, and pages that may not log an error nor violate their security policy."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.routes.openai.test_openai import TEMPLATE

NAMES = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 30.0  # until an action or an expectation fails; playwright's are 30 and 5
expect.set_options(timeout=1000 * SECONDS)
Open = Callable[..., Page]


@pytest.fixture(scope="module")  # while it is open, this thread's event loop is playwright's
def browser() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no browser here: none of {', '.join(NAMES)} is on the PATH")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def make_chatty_app(make_app: Callable[..., FastAPI], tmp_path: Path) -> Callable[..., FastAPI]:
    """Like ``make_app``, for a model with a chat template."""

    def make(**values: Any) -> FastAPI:
        file = tmp_path / "template.jinja"
        file.write_text(TEMPLATE)
        return make_app(**{"chat_template": file, **values})

    return make


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Opens the playground at an address; ``expected``: parts of console errors that may occur; ``query``: of
    the page."""
    contexts, unexpected = [], []

    def open_(address: str, expected: tuple[str, ...] = (), query: str = "", **options: Any) -> Page:
        context = browser.new_context(viewport={"width": 1280, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(1000 * SECONDS)

        def log(text: str) -> None:
            if not any(part in text for part in expected):
                unexpected.append(text)

        page.on("console", lambda message: log(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: log(str(error)))
        page.goto(f"{address}/{query}")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert unexpected == []
