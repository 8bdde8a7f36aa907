"""``bitdial serve``: the HTTP server."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from loaders.errors import LoaderError
from server.commands.command_line import FAILED, USAGE, UsageError, complain, parse, require
from server.commands.models_to_serve import named_models, open_models
from server.commands.progress import show_loading
from server.commands.room import require_room
from server.errors import ServiceError
from server.http.connection.open_files import most_connections, raise_limit
from server.observability.logs import set_up_logging
from server.service.precision_state import LoadProgress
from server.settings.server import Settings

if TYPE_CHECKING:
    from server.served_model import Wanted
    from server.service.pool import Pool

_INSTALL_OTLP = "pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"


class Options(Settings):
    """Serve a model over HTTP; each request picks its precision.

    Every option is also an environment variable of the same name in capitals:
    MAX_BATCH_SIZE=8 is --max-batch-size 8. Options override variables.
    """


def main(arguments: Sequence[str], command: str = "serve") -> int:
    """Serves.

    Args:
        command: the name that errors begin with; another one than ``serve`` shows the progress of loads.
    """
    try:
        wanted = _checked(arguments)
    except UsageError as error:
        complain(command, error)
        return USAGE
    except LoaderError as error:
        complain(command, error)
        return FAILED
    from server.app import create_app
    from server.http.server import Process
    from server.state import state_of

    first, *others = wanted
    settings = first.settings

    def listening(port: int) -> None:
        _announce(settings, port, [one.name or one.open().model_id for one in wanted])
        if sys.stderr.isatty() and command == "serve":
            pools = [model.pool for model in state_of(app).models.values()]
            bars.add(asyncio.create_task(show_loading(lambda: _loading(pools))))

    bars: set[asyncio.Task[None]] = set()  # the event loop's references to tasks are weak
    app = create_app(settings, others=others, first=first)
    process = Process(app, settings, on_listening=listening)
    code = process.serve_forever()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a model may be loading in a thread that can't be interrupted


def _checked(arguments: Sequence[str]) -> list[Wanted]:
    """The models to serve, opened before the server starts: what is wrong is one line and an exit code.

    Raises:
        UsageError: options are invalid or contradict each other, or a model has no room.
        LoaderError: a model can't be opened.
    """
    options = parse(Options, "serve", arguments)
    require(options.required_precisions(), options.resolved_device())
    _require_tracing(options)
    sources = named_models(options, arguments)
    for source in sources:
        _require_chat_template(source.chat_template, options.payload_limit)
    _require_files(options)
    set_up_logging(options.json_output, options.log_level, options.secrets())
    if sys.stderr.isatty():  # the imports take seconds
        models = ", ".join(source.name or source.source for source in sources)
        print(f"bitdial: starting with the model {models} …", file=sys.stderr, flush=True)
    wanted = open_models(options, sources)
    require_room(wanted)
    return wanted


def _require_tracing(options: Settings) -> None:
    if options.otlp_endpoint is None:
        return
    try:
        import_module("server.observability.otlp.telemetry").check()
    except ImportError:
        raise UsageError(f"--otlp-endpoint (or OTLP_ENDPOINT) needs OpenTelemetry: {_INSTALL_OTLP}") from None
    except ValueError as error:  # of one of its own variables
        raise UsageError(str(error)) from None


def _loading(pools: Iterable[Pool]) -> dict[str, LoadProgress]:
    return {
        pool.title(state): state.progress
        for pool in pools
        for state in pool.states()
        if state.state == "loading"
    }


def _require_chat_template(file: Path | None, payload_limit: int) -> None:
    """Raises: UsageError, if the file is not a template that compiles."""
    if file is None:
        return
    from server.service.chat.renderer import SUBJECT, ChatRenderer
    from server.service.chat.source import read_template

    async def check(template: str) -> None:
        renderer = ChatRenderer(template, {}, payload_limit)
        try:
            await renderer.check()
        finally:
            await renderer.stop()

    name = f"--chat-template (or CHAT_TEMPLATE) {str(file)[:200]!r}"
    try:
        asyncio.run(check(read_template(file)))
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from None
    except ServiceError as error:
        raise UsageError(f"{name} {error.message.removeprefix(SUBJECT)}") from None


def _require_files(options: Settings) -> None:
    raise_limit()
    try:
        most_connections(options.max_connections)
    except ValueError as error:
        raise UsageError(f"--max-connections (or MAX_CONNECTIONS): {error}") from None


def _announce(options: Settings, port: int, models: Sequence[str]) -> None:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(options.host, options.host)
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    key = ' -H "Authorization: Bearer $API_KEY"' if options.api_key else ""
    wanted = {"inputs": "Return a list of", "temperature": 0.7, "precision": options.precision}
    body = json.dumps(wanted)
    print(
        f"\nbitdial is listening on {address}\n"
        f"  open {address}/ in a browser\n"
        f"  every route: {address}/docs\n"
        f"  model {', '.join(models)}, default precision {options.precision}; try:\n\n"
        f"  curl {address}/generate{key} -H 'Content-Type: application/json' -d '{body}'\n",
        flush=True,
    )
