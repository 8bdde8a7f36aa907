#!/usr/bin/env python3
"""Writes the data of this folder's two tasks, from documentation that the bundled model was not trained on.

.venv/bin/python scripts/lm_eval/make_data.py FOLDER
"""

import json
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from loaders.texts import corpus

_CONTEXT, _LINE = 400, (24, 120)  # characters before the line; the length of a line that makes a question
_EVERY, _PAGES, _CHOICES = 8, 24, 4


def pages() -> list[str]:
    topics = [one.text for one in corpus.topics() if corpus.is_held_out(one.name)]
    return topics + [one.text for one in corpus.library(corpus.is_held_out) if one.kind == "docstrings"]


def questions(texts: Sequence[str], seed: int = 0) -> Iterator[dict[str, Any]]:
    """A page up to a line, that line, and three lines from other places."""
    draw = random.Random(seed)
    lines = [(text, at, line) for text in texts for at, line in _lines(text)]
    for text, at, line in lines[::_EVERY]:
        others = draw.sample([other for _, _, other in lines if other != line], _CHOICES - 1)
        choices = draw.sample([line, *others], _CHOICES)
        yield {"context": text[max(0, at - _CONTEXT) : at], "choices": choices, "answer": choices.index(line)}


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """(position, line) of the suitable lines with enough context before them."""
    at = 0
    for line in text.splitlines(keepends=True):
        if at >= _CONTEXT and _LINE[0] <= len(line.strip()) <= _LINE[1]:
            yield at, line
        at += len(line)


def write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    texts = pages()
    write(folder / "python_docs.jsonl", questions(texts))
    write(folder / "python_docs_perplexity.jsonl", ({"page": text} for text in texts[:_PAGES]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
