"""Answers are broken between words, on a terminal."""

import io

import pytest

from server.commands.chat.flow import Flow


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def written(pieces: list[str], out: io.StringIO) -> str:
    flow = Flow(out)
    for piece in pieces:
        flow.write(piece)
    flow.end()
    return out.getvalue()


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (["one tw", "o thr", "ee four"], "one two\nthree four\n"),
        (["if x:\n", "    pass", "\n\n", "x"], "if x:\n    pass\n\nx\n"),
        (["a" * 25, " b"], "a" * 25 + "\nb\n"),
        (["ends with a blank "], "ends with\na blank\n"),
        (["日本語の", "長", "い文章"], "日本語の長\nい文章\n"),
        (["👩\u200d👧 क\u094d\u200dष"], "👩\u200d👧 क\u094d\u200dष\n"),
        (["a\x1b[2Jb"], "a�[2Jb\n"),
        ([], ""),
    ],
)
def test_lines_end_between_words(pieces: list[str], shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "10")
    assert written(pieces, Terminal()) == shown


def test_a_pipe_gets_the_text_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "10")
    text = "one two three  four \n five"
    assert written([text], io.StringIO()) == f"{text}\n"
