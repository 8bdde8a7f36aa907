"""What begins with a slash: the commands of ``bitdial chat``."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from server.commands.chat.answer import Answer
from server.commands.chat.conversation import Conversation
from server.commands.chat.errors import ChatError
from server.commands.side_by_side import shown, side_by_side
from server.tables import NONE, aligned

if TYPE_CHECKING:
    from server.commands.chat.repl import Chat

NO_TEMPLATE = "this model has no chat template, and so no system message; --chat-template FILE gives it one"
_WIDEST = 160


class Leave(Exception):
    """The conversation is over."""


@dataclass(frozen=True)
class _Command:
    run: Callable[[Chat, str], None]
    arguments: str
    help: str


def obey(chat: Chat, text: str) -> None:
    """Runs the command that ``text`` begins with.

    Raises:
        ChatError: there is no such command, or it can't be obeyed.
        Leave
    """
    name, _, rest = text.partition(" ")
    command = _COMMANDS.get(_SHORT.get(name, name))
    if command is None:
        raise ChatError(f"there is no {shown(name)}: /help lists the commands; // begins a message with /")
    command.run(chat, rest.strip())


def words(chat: Chat) -> Mapping[str, Sequence[str]]:
    """The commands, and of each what may follow it."""
    names = list(_known(chat)) if chat.known is None else chat.known
    chat.known = names
    following = {
        "/model": chat.served.models,
        "/precision": names,
        "/compare": names,
        "/set": [*type(chat.sampling).model_fields],
    }
    return {name: following.get(name, []) for name in _COMMANDS}


def _model(chat: Chat, name: str) -> None:
    if not name:
        for one in chat.served.models:
            print(f"{'▸' if one == chat.served.model else ' '} {shown(one)}")
        return
    chat.go_on_with(name)


def _precision(chat: Chat, name: str) -> None:
    known = _known(chat)
    if not name:
        rows = [(one, entry["state"], entry["reason"] or "") for one, entry in known.items()]
        print("\n".join(aligned([("precision", "state", ""), *rows], _width(), left=(0, 1, 2))))
        return
    name = _canonical(known, name)
    chat.client.load(name)
    chat.precision = name
    chat.note(f"from here on in {name}")


def _compare(chat: Chat, names: str) -> None:
    if not chat.conversation.turns:
        raise ChatError("there is no answer yet to compare")
    known = _known(chat)
    loaded = [name for name, entry in known.items() if entry["state"] == "loaded"]
    others = [_canonical(known, name) for name in names.replace(",", " ").split()] or loaded
    *_, last = chat.conversation.turns
    whole, chat.conversation = chat.conversation, chat.conversation.before_last()
    try:
        answers = [_again(chat, last.question, name) for name in dict.fromkeys([chat.precision, *others])]
    finally:
        chat.conversation = whole
    _show_beside(answers)


def _again(chat: Chat, question: str, precision: str) -> Answer:
    chat.client.load(precision)
    answer = Answer(precision)
    chat.fill(answer, question, lambda text: None)
    return answer


def _show_beside(answers: Sequence[Answer]) -> None:
    """The first answer beside each other one, with a mark where they part."""
    first, *others = answers
    for answer in answers:
        print(f"[{answer.figures()}]")
    if not others:
        print(f"only {first.precision} is loaded: /compare NAME loads another")
    for answer in others:
        if answer.text == first.text:
            print(f"\n{answer.precision} answers with the same text as {first.precision}.")
            continue
        titles, texts = (first.precision, answer.precision), (first.text, answer.text)
        print("\n" + "\n".join(side_by_side(titles, texts, min(_width(), _WIDEST))))


def _stats(chat: Chat, _: str) -> None:
    stats = chat.client.get("stats")
    head = ("precision", "weights MB", "KV cache MB", "bits", "requests", "TTFT ms", "tok/s")
    rows = [_figures(name, one) for name, one in stats["precisions"].items() if one["state"] == "loaded"]
    print("\n".join(aligned([head, *rows], _width())))
    print(f"{len(chat.conversation.turns)} turns; {chat.sampling.shown()}")


def _figures(name: str, one: Mapping[str, Any]) -> tuple[str, ...]:
    memory, latency = one["memory"], one["latency"]
    first, speed = latency["ttft_ms"]["p50"], one["throughput"]["tokens_per_second"]
    return (
        name,
        f"{memory['weights_bytes'] / 1e6:.1f}",
        f"{memory['kv_cache_bytes'] / 1e6:.1f}",
        NONE if memory["bits_per_weight"] is None else f"{memory['bits_per_weight']:.2f}",
        str(latency["requests"]),
        NONE if first is None else f"{first:.0f}",
        NONE if speed is None else f"{speed:.1f}",
    )


def _system(chat: Chat, text: str) -> None:
    if not chat.served.templated:
        raise ChatError(NO_TEMPLATE)
    if text:
        chat.conversation.system = None if text == "off" else text
    print(f"system message: {chat.conversation.system or 'none'}")


def _set(chat: Chat, text: str) -> None:
    name, _, value = text.partition(" ")
    if name:
        if not value.strip():
            raise ChatError("/set NAME VALUE, such as /set temperature 0.7; off unsets it")
        try:
            chat.sampling = chat.sampling.changed(name, value.strip())
        except ValueError as error:
            raise ChatError(str(error)) from None
    print(chat.sampling.shown())


def _retry(chat: Chat, _: str) -> None:
    if not chat.conversation.turns:
        raise ChatError("there is no answer yet to repeat")
    last, chat.conversation = chat.conversation.turns[-1], chat.conversation.before_last()
    turns = list(chat.conversation.turns)
    try:
        chat.ask(last.question)
    finally:
        if chat.conversation.turns == turns:  # nothing came: the old answer stands
            chat.conversation.turns.append(last)


def _undo(chat: Chat, _: str) -> None:
    chat.conversation = chat.conversation.before_last()
    print(f"{len(chat.conversation.turns)} turns are left")


def _clear(chat: Chat, _: str) -> None:
    chat.conversation = Conversation(chat.conversation.system)
    print("the conversation begins anew")


def _help(chat: Chat, _: str) -> None:
    rows = [(f"{name} {command.arguments}", command.help) for name, command in _COMMANDS.items()]
    print("\n".join(aligned([*rows, *_TYPING], _width(), left=(0, 1))))


def _leave(chat: Chat, _: str) -> None:
    raise Leave


def _known(chat: Chat) -> dict[str, dict[str, Any]]:
    """The server's precisions by name."""
    return {entry["name"]: entry for entry in chat.client.get("precisions")}


def _canonical(known: Mapping[str, Mapping[str, Any]], name: str) -> str:
    for one, entry in known.items():
        if name == one or name in entry["aliases"]:
            if entry["state"] == "unavailable":
                raise ChatError(f"{one} can't be served there: {entry['reason']}")
            return one
    raise ChatError(f"there is no precision {shown(name)}; there are {', '.join(known)}")


def _width() -> int:
    return shutil.get_terminal_size().columns


_COMMANDS = {
    "/model": _Command(_model, "[NAME]", "go on with another model of the server; alone: lists them"),
    "/precision": _Command(_precision, "[NAME]", "go on in another precision; alone: lists them"),
    "/compare": _Command(_compare, "[NAMES]", "the last answer in these, or all loaded, side by side"),
    "/stats": _Command(_stats, "", "memory and speed of the loaded precisions"),
    "/system": _Command(_system, "[TEXT]", "the system message; off removes it"),
    "/set": _Command(_set, "[NAME VALUE]", "a sampling parameter, such as temperature 0.7; off unsets it"),
    "/retry": _Command(_retry, "", "answer the last message again"),
    "/undo": _Command(_undo, "", "forget the last message and its answer"),
    "/clear": _Command(_clear, "", "forget all messages, but not the system message"),
    "/help": _Command(_help, "", "this list"),
    "/bye": _Command(_leave, "", "end, as Ctrl-D does"),
}
_SHORT = {"/exit": "/bye", "/quit": "/bye", "/q": "/bye", "/?": "/help", "/h": "/help", "/p": "/precision"}
_TYPING = (
    ("", ""),
    ("Ctrl-C", "stops the answer"),
    ("Alt-Enter", "a new line; a pasted text keeps its lines"),
    ('"""', "begins and ends a message of several lines"),
    ("↑ Ctrl-R", "earlier messages; search in them"),
    ("//", "sends a line that begins with /"),
)
