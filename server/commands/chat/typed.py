"""What is typed: lines with history and completion on a terminal, plain lines otherwise."""

import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.utils import is_dumb_terminal

QUOTES = '"""'
"""Begins and ends a message of several lines."""

Input = Callable[[], str]
"""The next message. Raises ``EOFError`` at the end, ``KeyboardInterrupt`` for Ctrl-C."""
Words = Callable[[], Mapping[str, Sequence[str]]]
"""The commands and, of each, what may follow it."""


def make_input(prompt: Callable[[], str], words: Words, keep_history: bool) -> Input:
    """Reads from the terminal, or plain lines of standard input if that, the output or its cursor is none."""
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if not is_terminal or is_dumb_terminal():
        if isinstance(sys.stdin, io.TextIOWrapper):
            # a line that is not UTF-8 is an error of its own, and not of those read with it
            sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
        return _Lines(sys.stdin, prompt if is_terminal else lambda: "").read
    history: History = InMemoryHistory()
    if keep_history and (file := _history_file()) is not None:
        history = FileHistory(str(file))
    session: PromptSession[str] = PromptSession(
        history=history,
        completer=_Commands(words),
        complete_while_typing=False,
        key_bindings=_keys(),
        multiline=True,  # Enter is bound to what ends a message
        prompt_continuation=lambda width, line, wrapped: " " * width,
        enable_open_in_editor=True,
        enable_suspend=True,
    )
    return lambda: unquoted(session.prompt(prompt()))


def is_open(text: str) -> bool:
    """Whether the quotes that begin a message are not closed yet."""
    return text.lstrip().startswith(QUOTES) and text.count(QUOTES) < 2


def unquoted(text: str) -> str:
    """A message without the quotes around it, and without blank ends."""
    text = text.strip()
    if text.startswith(QUOTES):
        text = text.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")
    return text


def _as_utf_8(text: str) -> str:
    """With the replacement character for bytes that were not UTF-8, which Python reads as lone surrogates."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class _Lines:
    """Messages one a line, or several lines in quotes; ``prompt`` is shown before each."""

    def __init__(self, lines: Iterator[str], prompt: Callable[[], str]) -> None:
        self._lines, self._prompt = lines, prompt

    def read(self) -> str:
        print(self._prompt(), end="", flush=True)
        text = next(self._lines, None)
        while text is not None and is_open(text) and (more := next(self._lines, None)) is not None:
            text += more
        if text is None:
            raise EOFError
        return unquoted(text)


class _Commands(Completer):
    def __init__(self, words: Words) -> None:
        self._words = words

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        command, space, rest = document.text_before_cursor.partition(" ")
        if not command.startswith("/"):
            return
        words = self._words()
        typed = rest.rpartition(" ")[2] if space else command
        for word in words.get(command, ()) if space else words:
            if word.startswith(typed):
                yield Completion(word, start_position=-len(typed))


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.text = _as_utf_8(buffer.text)  # the history's file takes nothing else
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _history_file() -> Path | None:
    """Where typed messages are kept, readable by this user alone; None where nothing can be written."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    file = Path(state) / "bitdial" / "chat_history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
    except OSError:
        return None
    return file
