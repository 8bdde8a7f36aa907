"""What the tests of the playground do with a page, and what they have its models say."""

from collections.abc import Sequence

import torch
from fastapi import FastAPI
from playwright.sync_api import Locator, Page, expect
from torch import Tensor

from tests.checkpoints import byte_tokenizer
from tests.fakes import FakeRunner

_LETTERS = byte_tokenizer().encode("abcdefghijklmnopqrstuvwxyz")


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


def varying(runner: FakeRunner, key: int) -> None:
    """Makes every letter possible, so that whatever samples shows; how likely depends on key and context."""

    def logits(found: Tensor, slots: Sequence[int]) -> Tensor:
        for row, slot in zip(found, slots, strict=True):
            row[:] = -50
            context = sum((at + 1) * id_ for at, id_ in enumerate(runner.held[slot]))
            row[_LETTERS] = torch.linspace(0, 2, len(_LETTERS)).roll((context + key) % len(_LETTERS))
        return found

    runner.poison = logits


def column(page: Page, precision: str) -> Locator:
    return page.locator(f'.column[data-precision="{precision}"]')


def answer(page: Page, precision: str) -> Locator:
    return column(page, precision).locator(".output")


def set_controls(page: Page, **parameters: object) -> None:
    page.locator("#sampling").evaluate("details => { details.open = true }")
    for name, value in parameters.items():
        control = page.get_by_label(name, exact=True)
        if control.evaluate("element => element.tagName") == "SELECT":
            control.select_option(str(value).lower())
        else:
            control.fill(str(value))


def ask(page: Page, prompt: str, **parameters: object) -> None:
    page.fill("#prompt", prompt)
    set_controls(page, **parameters)
    page.click("#run")


def finished(page: Page) -> None:
    expect(page.locator("#status")).to_contain_text("Finished")
    expect(page.locator("#run")).to_be_enabled()


def in_flight(app: FastAPI) -> int:
    return int(app.state.service.places.in_flight)


def overflows(place: Page | Locator) -> bool:
    """Whether the page, or an element, is wider inside than there is room."""
    if isinstance(place, Page):
        return bool(place.evaluate("document.documentElement.scrollWidth > innerWidth"))
    return bool(place.evaluate("element => element.scrollWidth > element.clientWidth"))
