"""Bars on a terminal, lines elsewhere."""

import asyncio
import io
import logging
from contextlib import redirect_stderr

import pytest

from server.commands.progress import ProgressBars, show_loading
from server.service.precision_state import LoadProgress
from tests.conftest import until


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    screen = Terminal()
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    return screen


def test_a_stage_is_a_line_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    bars = ProgressBars("int8")
    for done in range(3):
        bars("loading", done, 2)
    bars("quantizing", 0, 0)
    bars("training: loss 0.5", 1, 2)
    bars("training: loss 0.4", 2, 2)
    bars.close()
    assert capsys.readouterr().err.splitlines() == [
        "int8: loading …",
        "int8: quantizing …",
        "int8: training: loss 0.5 …",
    ]


def test_what_takes_seconds_is_quiet_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    bars = ProgressBars("int8", quiet=True)
    bars("loading", 1, 2)
    bars("downloading", 0, 0)
    assert capsys.readouterr().err == "int8: downloading …\n"


def test_a_bar_shows_how_far_a_stage_is(terminal: Terminal) -> None:
    bars = ProgressBars("int8")
    with redirect_stderr(terminal):
        bars("loading", 1, 4)
        bars("quantizing", 0, 0)
        bars("training: loss 0.5", 1, 2)
        bars("training: loss 0.4", 2, 2)
        bars.close()
    drawn = terminal.getvalue()
    assert "int8: loading  25%|" in drawn
    assert "1/4" in drawn
    assert "int8: quantizing … [00:00]" in drawn
    assert "int8: training: loss 0.4 100%|" in drawn
    assert "?it/s" not in drawn


def test_progress_is_drawn_below_the_log(terminal: Terminal) -> None:
    loading = {"int8": LoadProgress("packing", 3, 6)}
    logger, handler = logging.getLogger(), logging.StreamHandler(terminal)
    logger.addHandler(handler)

    async def watch() -> None:
        task = asyncio.create_task(show_loading(lambda: loading))
        await until(lambda: "50%" in terminal.getvalue())
        logger.warning("something happened")
        loading.clear()
        await until(lambda: terminal.getvalue().endswith("\r"))
        task.cancel()

    try:
        with redirect_stderr(terminal):
            asyncio.run(watch())
    finally:
        logger.removeHandler(handler)
    drawn = terminal.getvalue()
    assert "int8: packing  50%|" in drawn
    assert "\rsomething happened\n" in drawn  # at the start of a new line
    assert drawn.endswith("\r")  # the bar is gone
