"""Selects the chat template: a file's or the tokenizer's own."""

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.service.chat.renderer import ChatRenderer

_LARGEST_FILE = 2**20  # bytes


def read_template(file: Path) -> str:
    """A template from a file.

    Raises:
        ValueError: it can't be read, or is not text; the message doesn't name the file.
    """
    try:
        with open(file, "rb", opener=_without_waiting) as opened:
            if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
                raise ValueError("it is not a regular file")
            raw = opened.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise ValueError(f"it can't be read: {error.strerror}") from None
    if len(raw) > _LARGEST_FILE:
        raise ValueError(f"it is larger than {_LARGEST_FILE} bytes")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    if not text.strip():
        raise ValueError("it is empty")
    return text


def _without_waiting(path: str, flags: int) -> int:
    """Opens without blocking, even a FIFO without a writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def template_of(tokenizer: Any) -> str | None:
    """The tokenizer's own template, the default one of several; None if it has none."""
    found = getattr(tokenizer, "chat_template", None)
    if isinstance(found, Mapping):
        found = found.get("default")
    return found if isinstance(found, str) and found else None


def make_renderer(tokenizer: Any, file: Path | None, payload_limit: int) -> ChatRenderer | None:
    """The renderer of the template in ``file``, or else of the tokenizer's own; None without either.

    Args:
        payload_limit: bytes of the largest request body.

    Raises:
        ValueError: the file is unusable.
    """
    template = template_of(tokenizer) if file is None else read_template(file)
    if template is None:
        return None
    variables = json.loads(json.dumps(tokenizer.special_tokens_map, default=str))
    return ChatRenderer(template, variables, payload_limit)
