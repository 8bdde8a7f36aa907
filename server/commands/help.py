"""Layout of ``--help``: options under headings, with named values and defaults in words."""

import argparse
import shutil
from collections.abc import Mapping
from typing import Any, Protocol

_WIDEST = 100


class Field(Protocol):
    """The part of a pydantic field that is used."""

    default: Any
    description: str | None
    json_schema_extra: Any

    def is_required(self) -> bool: ...


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Equal on every CPython version: a value is shown once for all names of its option."""

    def __init__(self, prog: str, **others: Any) -> None:
        width = min(shutil.get_terminal_size().columns, _WIDEST) - 2
        super().__init__(prog, **{**others, "max_help_position": 34, "width": width})

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        if isinstance(action, argparse.BooleanOptionalAction):
            return f"--[no-]{action.option_strings[0].removeprefix('--')}"
        names = ", ".join(action.option_strings)
        return f"{names} {action.metavar}" if action.metavar else names


class Arguments:
    """Replaces ``ArgumentParser.add_argument``: adds an option as its field describes it.

    Args:
        fields: by name; ``json_schema_extra`` may have a ``group``, a ``metavar``, a description of the
            default (``unset``), and the value of the option without argument (``bare``).
    """

    def __init__(self, fields: Mapping[str, Field]) -> None:
        self._fields = fields
        self._groups: dict[str, Any] = {}
        self.positional: list[str] = []
        """Names of positional arguments, as shown."""

    def add(self, parser: argparse.ArgumentParser, *names: str, **arguments: Any) -> argparse.Action:
        field = self._fields.get(arguments.get("dest", names[0]))
        if field is None:  # --help itself
            return parser.add_argument(*names, **arguments)
        if not names[0].startswith("-"):
            name = arguments["metavar"]
            self.positional.append(name if field.is_required() else f"[{name}]")
            return parser.add_argument(*names, **{**arguments, "help": field.description})
        shown = field.json_schema_extra or {}
        if "metavar" in arguments:
            arguments["metavar"] = shown.get("metavar")
        if "bare" in shown:
            arguments |= {"nargs": "?", "const": shown["bare"]}
        note = "required" if field.is_required() else f"default: {default_of(field)}"
        arguments["help"] = f"{field.description} [{note}]".replace("%", "%%")
        action: argparse.Action = self._group(parser, shown["group"]).add_argument(*names, **arguments)
        return action

    def _group(self, parser: argparse.ArgumentParser, title: str) -> Any:
        if title not in self._groups:
            self._groups[title] = parser.add_argument_group(title)
        return self._groups[title]


def default_of(field: Field) -> str:
    """The default in words: a value, or the description of None."""
    value = field.default
    if value is None or value == ():
        return (field.json_schema_extra or {}).get("unset") or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
