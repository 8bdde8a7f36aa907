"""A model's chat template: messages → the text of a conversation.

The environment equals that of ``transformers``' ``apply_chat_template``, whose module needs most of a second
and 180 MB of address space to import. This module runs in a separate process
(``server.service.chat.process``) and imports only Jinja.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

Message = Mapping[str, Any]
_REASONING = ("reasoning_content", "thinking", "reasoning")
_MARK = "4815162342{:05d}"
"""Content of a trial message: digits, which trimming, quoting and a change of case leave as they are."""
_MARKS = re.compile(r"4815162342\d{5}")


class TemplateRefusal(Exception):
    """The template called ``raise_exception``, with this message."""


class RoleDropped(Exception):
    """The template silently drops a message.

    Args:
        index: index of the dropped message.
        role: its role.
    """

    def __init__(self, index: int, role: str) -> None:
        super().__init__(f"message {index}, role {role}")
        self.index, self.role = index, role


class TooLong(Exception):
    """The text exceeds its limit."""


class ChatTemplate:
    """A compiled template.

    Args:
        source: a Jinja template.
        variables: its variables besides the messages: the special tokens by name.
        most: the most characters of a rendered text.

    Raises:
        jinja2.TemplateSyntaxError
    """

    def __init__(self, source: str, variables: Mapping[str, Any], most: int) -> None:
        self._template = environment().from_string(source)
        self._variables, self._most = dict(variables), most
        self._knows_developer = "developer" in source
        self._served_roles = lru_cache(256)(self._find_roles)

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as text, up to the beginning of the assistant's message.

        A ``developer`` message is rendered as ``system`` if the template doesn't know ``developer``.

        Raises:
            TemplateRefusal, RoleDropped, TooLong: and any other exception that the template causes.
        """
        roles = self._served_roles(tuple(message["role"] for message in messages))
        return self._render(
            [{**message, "role": role} for message, role in zip(messages, roles, strict=True)]
        )

    def _find_roles(self, roles: tuple[str, ...]) -> tuple[str, ...]:
        """The roles with which the template renders every message of such a conversation."""
        candidates = self._candidates(roles)
        dropped = [self._dropped(candidate) for candidate in candidates]
        if [] in dropped:
            return candidates[dropped.index([])]
        if None in dropped:  # rendering then raises the reason
            return candidates[dropped.index(None)]
        index = next(indices[0] for indices in dropped if indices)
        raise RoleDropped(index, roles[index])

    def _candidates(self, roles: tuple[str, ...]) -> list[tuple[str, ...]]:
        if "developer" not in roles:
            return [roles]
        as_system = tuple("system" if role == "developer" else role for role in roles)
        return [roles, as_system] if self._knows_developer else [as_system, roles]

    def _dropped(self, roles: Sequence[str]) -> list[int] | None:
        """Indices of the messages that are missing from a rendered trial conversation; None if that fails.

        The trial doesn't use the client's contents, which a template may shorten on purpose (reasoning).
        """
        marks = [_MARK.format(index) for index in range(len(roles))]
        trial = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        try:
            found = set(_MARKS.findall(self._render(trial)))
        except Exception:
            return None
        return [index for index, mark in enumerate(marks) if mark not in found]

    def _render(self, messages: Sequence[Message]) -> str:
        chat = [_prepared(message) for message in messages]
        pieces, length = [], 0
        try:
            for piece in self._template.generate(
                **{**self._variables, "messages": chat, "tools": None, "documents": None},
                add_generation_prompt=True,
            ):
                length += len(piece)
                if length > self._most:
                    raise TooLong
                pieces.append(piece)
        except TemplateError as error:
            if type(error) is TemplateError:  # not one of Jinja's own subclasses
                raise TemplateRefusal(str(error.message)) from None
            raise
        return "".join(pieces)


def _prepared(message: Message) -> dict[str, Any]:
    """The message without nulls, which templates would print, with its reasoning under both usual names."""
    given = {name: value for name, value in message.items() if value is not None}
    reasoning = next((given[name] for name in _REASONING if name in given), None)
    if reasoning is None:
        return given
    return {"thinking": reasoning, **given, "reasoning_content": reasoning}


def environment() -> ImmutableSandboxedEnvironment:
    """The sandboxed Jinja environment of every template."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace
    )
    return made


class _GenerationBlock(Extension):
    """``{% generation %}`` marks the assistant's text for training; its contents are rendered unchanged."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_unchanged"), [], [], body).set_lineno(line)

    def _unchanged(self, caller: Any) -> Any:
        return caller()


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own filter, doesn't escape HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: Any) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class _Dict:
    """``dict`` without the type's attributes."""

    def __call__(self, *arguments: Any, **named: Any) -> dict[Any, Any]:
        return dict(*arguments, **named)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        return dict.fromkeys(*arguments)


class _Namespace(Namespace):
    """Jinja's namespace without private attributes."""

    def __init__(*arguments: Any, **named: Any) -> None:  # so that ``self`` may be the name of an attribute
        self, given = arguments[0], dict(*arguments[1:], **named)
        for name in given:
            _check_public(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no private attributes, but got {name!r}")
