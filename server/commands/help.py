"""How ``--help`` looks: options under headings, values by what they mean, defaults in plain words."""

import argparse
import shutil
from collections.abc import Mapping
from typing import Any, Protocol

_WIDEST = 100


class Field(Protocol):
    """What is needed of a pydantic field."""

    default: Any
    description: str | None
    json_schema_extra: Any

    def is_required(self) -> bool: ...


class Formatter(argparse.RawDescriptionHelpFormatter):
    """The same on every CPython: a value is shown once for all names of its option."""

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
    """In place of ``ArgumentParser.add_argument``: shows an option as its field says.

    Args:
        fields: by name; each may say its ``group``, its ``metavar``, what it does if ``unset``, and the value
            that it has if it is given ``bare``.
    """

    def __init__(self, fields: Mapping[str, Field]) -> None:
        self._fields = fields
        self._groups: dict[str, Any] = {}
        self.positional: list[str] = []
        """What comes after the options, as shown."""

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
        arguments["help"] = f"{field.description} [default: {default_of(field)}]".replace("%", "%%")
        action: argparse.Action = self._group(parser, shown["group"]).add_argument(*names, **arguments)
        return action

    def _group(self, parser: argparse.ArgumentParser, title: str) -> Any:
        if title not in self._groups:
            self._groups[title] = parser.add_argument_group(title)
        return self._groups[title]


def default_of(field: Field) -> str:
    """The default in plain words: a value, or what is done where none is given."""
    value = field.default
    if value is None or value == ():
        return (field.json_schema_extra or {}).get("unset") or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
