"""``bitdial chat``: a conversation in the terminal, with a running server or with one of its own."""

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from urllib.parse import urlsplit

from server.commands.chat.client import Client
from server.commands.chat.conversation import Sampling
from server.commands.chat.errors import ChatError
from server.commands.chat.own_server import OwnServer
from server.commands.chat.repl import Chat
from server.commands.chat.typed import make_input
from server.commands.command_line import FAILED, USAGE, UsageError, complain, parse, require
from server.settings.server import ChatSettings
from server.settings.types import Key, option

_TALK, _SERVER = "conversation", "a running server"


class Options(ChatSettings):
    """Talk with the model, and change the precision in mid-conversation.

    Starts a server for itself, or uses the one at --url, where --model may name one
    of several. A model without a chat template continues each message instead.
    /help lists what can be typed.
    """

    url: str | None = option(
        None, _SERVER, "URL", "its address, such as http://127.0.0.1:8080", unset="starts one for itself"
    )
    api_key: Key | None = option(
        None, _SERVER, "KEY", "its key", unset="API_KEY of the environment, if there is one"
    )
    system: str | None = option(None, _TALK, "TEXT", "the system message", min_length=1)
    max_new_tokens: int = option(512, _TALK, "N", "most tokens of an answer", ge=1)
    temperature: float | None = option(
        None, _TALK, "X", "sample; higher is more random", unset="1 if sampling", gt=0, le=2
    )
    top_k: int | None = option(None, _TALK, "N", "sample among the N most probable tokens", unset="all", ge=1)
    top_p: float | None = option(
        None, _TALK, "X", "sample within this probability mass", unset="all", gt=0, lt=1
    )
    seed: int | None = option(
        None, _TALK, "N", "of the random stream", unset="another one for every answer", ge=0, lt=2**64
    )
    history: bool = option(True, _TALK, None, "keep what was typed for the arrow keys of the next time")

    def sampling(self) -> Sampling:
        names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
        return Sampling(**{name: getattr(self, name) for name in names})


def main(arguments: Sequence[str]) -> int:
    try:
        options = parse(Options, "chat", arguments)
        if options.url is not None:
            _check_url(options.url, arguments)
        else:
            require([options.precision], options.resolved_device())
        return _chat(options, arguments)
    except UsageError as error:
        complain("chat", error)
        return USAGE
    except ChatError as error:
        complain("chat", error)
        return error.exit_code or FAILED


def _chat(options: Options, arguments: Sequence[str]) -> int:
    own = None
    with ExitStack() as stack:
        if options.url is None:
            own = stack.enter_context(OwnServer(options))
            client = Client(own.url, own.key, proxies=False)
        else:
            key = options.api_key.get_secret_value() if options.api_key else os.environ.get("API_KEY")
            client = Client(options.url, key)
        stack.enter_context(client)
        model = None if options.url is None else _served_model(options, arguments)
        named = options.url is None or "precision" in options.model_fields_set
        precision = options.precision if named else None
        ended = None if own is None else own.ended
        chat = Chat(client, model, precision, options.sampling(), options.system, ended)
        return chat.run(make_input(chat.prompt, chat.words, options.history and sys.stdin.isatty()))


def _served_model(options: Options, arguments: Sequence[str]) -> str | None:
    """The name in ``--model``; a MODEL_ID of the environment is of servers that are started here."""
    given = {argument.partition("=")[0] for argument in arguments}
    return options.model_id if {"--model", "--model-id"} & given else None


def _check_url(url: str, arguments: Sequence[str]) -> None:
    """Raises: UsageError, for no address, and for options that only the server's own command line has."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise UsageError(f"--url: {url[:200]!r} is not an address such as http://127.0.0.1:8080")
    names = ChatSettings.model_fields.keys() - {"precision", "model_id"}
    flags = {f"--{name.replace('_', '-')}" for name in names}
    for given in (argument.partition("=")[0] for argument in arguments):
        if given in flags:
            raise UsageError(f"{given} is not for a running server: it has its own")
