"""Fenced code blocks of a document, by the comment above them.

``<!-- run -->``: a Python block runs as a program, the lines ``$ …`` of a console block are run as commands.
``<!-- serve: OPTIONS -->``: commands in a shell, beside a server with these options.
``<!-- file: PATH -->``: the text of a file.
"""

import re
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
_BLOCK = re.compile(r"^<!-- (run|serve|file)(?:: (.*?))? -->\n```(\w+)\n(.*?)^```$", re.M | re.S)
_COMMAND = re.compile(r"^\$ ((?:.*\\\n)*.*)$", re.M)


@dataclass(frozen=True)
class Block:
    kind: str
    argument: str
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """The commands of a console block, without their output."""
        return _COMMAND.findall(self.text)


def blocks(document: str, kind: str) -> list[Block]:
    found = (Block(*map(str, match.groups(""))) for match in _BLOCK.finditer((DOCS / document).read_text()))
    return [block for block in found if block.kind == kind]
