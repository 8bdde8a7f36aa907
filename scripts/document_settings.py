#!/usr/bin/env python3
"""Writes the tables of docs/settings.md from the declared settings; run it after changing one.

.venv/bin/python scripts/document_settings.py
"""

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from server.commands.help import default_of
from server.settings.server import Settings

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "settings.md"
_TABLES = re.compile(r"(?<=<!-- tables -->\n).*(?=<!-- end of the tables -->)", re.S)


def document() -> str:
    """The text of docs/settings.md with up-to-date tables."""
    return _TABLES.sub(lambda _: _tables(), DOCUMENT.read_text())


def _tables() -> str:
    groups: dict[str, list[str]] = {}
    for name, field in Settings.model_fields.items():
        shown: Any = field.json_schema_extra
        groups.setdefault(shown["group"], []).append(_row(name, field))
    head = "| environment | option | default | meaning |\n|---|---|---|---|"
    return "".join(
        f"\n## {title[0].upper()}{title[1:]}\n\n{head}\n{''.join(rows)}\n" for title, rows in groups.items()
    )


def _row(name: str, field: Any) -> str:
    names = field.validation_alias.choices if field.validation_alias else [name]
    flags = [one.replace("_", "-") for one in names]
    if field.annotation is bool:
        options = f"`--[no-]{flags[0]}`"
    else:
        options = ", ".join(f"`--{flag}`" for flag in flags)
    value = default_of(field)
    # a description of an unset default is not a valid value, so it is not shown as code
    default = f"*{value}*" if field.default is None or field.default == () else f"`{value}`"
    variables = ", ".join(f"`{one.upper()}`" for one in names)
    return f"| {variables} | {options} | {default} | {field.description} |\n"


if __name__ == "__main__":
    DOCUMENT.write_text(document())
