"""Whatever fails, and whenever the client disconnects: places, engines, slots and tasks are released."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from itertools import product
from typing import Any, Literal

import httpx
import psutil
import pytest
from fastapi import FastAPI

from server.engine.sequence import Token
from server.engine.token_stream import TokenStream
from server.errors import ServiceError
from tests.conftest import PATIENCE, Loads, at_rest, entered, until
from tests.fakes import FakeRunner
from tests.routes.test_generate import PROMPT

MakeApp = Callable[..., FastAPI]
STEPS = range(7)  # of the event loop, between the failure and the disconnect
When = tuple[int, Literal["token", "error"]]
FAULTS: list[When] = [(1, "error"), (4, "error"), (4, "token")]
UNLOADS: list[When] = [(3, "error")]
ROUTES: dict[str, tuple[str, dict[str, Any]]] = {
    "generate": ("/generate", {"inputs": PROMPT}),
    "best of": ("/generate", {"inputs": PROMPT, "best_of": 2, "do_sample": True, "details": True}),
    "stream": ("/generate_stream", {"inputs": PROMPT}),
    "completions": ("/v1/completions", {"prompt": [PROMPT, "a"], "n": 2, "echo": True, "logprobs": 1}),
    "completions stream": ("/v1/completions", {"prompt": [PROMPT, "a"], "n": 2, "stream": True}),
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "n": 2}),
    "chat stream": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "stream": True}),
    "compare": ("/compare", {"inputs": PROMPT, "precisions": ["bf16"]}),
}
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


class Client:
    """A client on the ASGI interface."""

    def __init__(self, app: FastAPI, path: str, body: dict[str, Any]) -> None:
        self._body: bytes | None = json.dumps(body).encode()
        self._left = asyncio.Event()
        headers = [(b"content-type", b"application/json")]
        scope: dict[str, Any] = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "headers": headers,
        }
        scope |= {"query_string": b"", "root_path": "", "scheme": "http", "http_version": "1.1", "state": {}}
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        await asyncio.sleep(0)  # a server ignores sends to a closed connection

    def leave(self) -> None:
        self._left.set()

    def cancel(self) -> None:
        """Cancels the request, as the server does at the end of its graceful timeout."""
        self.task.cancel()


LEAVING: dict[str, Callable[[Client], None]] = {"leaves": Client.leave, "is cancelled": Client.cancel}


def after(steps: int, act: Callable[[], Any]) -> None:
    """Calls ``act`` after so many iterations of the event loop."""
    loop = asyncio.get_running_loop()
    if steps:
        loop.call_soon(after, steps - 1, act)
    else:
        act()


class Watch:
    """Observes the events for the engines' readers, and acts at the n-th token or the first error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens = 0
        self.at: dict[int, Callable[[], object]] = {}
        self.at_error: Callable[[], object] | None = None
        put = TokenStream.put

        def watched(generation: TokenStream, event: Token | ServiceError | None) -> None:
            put(generation, event)
            self._seen(event)

        monkeypatch.setattr(TokenStream, "put", watched)

    def _seen(self, event: Token | ServiceError | None) -> None:
        if isinstance(event, Token):
            self.tokens += 1
            self.at.pop(self.tokens, lambda: None)()
        elif event is not None and self.at_error is not None:
            act, self.at_error = self.at_error, None
            act()

    def reset(self) -> None:
        self.tokens, self.at, self.at_error = 0, {}, None


class Failing:
    """Ways in which all running requests fail after ``tokens`` tokens."""

    def __init__(self, app: FastAPI, loads: Loads, watch: Watch) -> None:
        self._app, self._loads, self._watch = app, loads, watch

    def fault(self, tokens: int) -> None:
        def fail(slots: Sequence[int]) -> None:
            if self._watch.tokens >= tokens:
                raise RuntimeError("a broken kernel")

        for runner in self._loads.runners.values():
            runner.on_decode = fail

    def unload(self, tokens: int) -> None:
        for runner in self._loads.runners.values():
            runner.delay = 0.001  # unloaded before it has finished
        self._watch.at[tokens] = lambda: asyncio.ensure_future(self._app.state.pool.unload("fp32"))

    def over(self) -> None:
        for runner in self._loads.runners.values():
            runner.on_decode, runner.delay = FakeRunner().on_decode, 0.0


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


@asynccontextmanager
async def ready(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with entered(app) as client:
        app.state.default.codec._tokenizer.chat_template = TEMPLATE
        yield client
        await at_rest(app, client)


async def nothing_is_held(app: FastAPI, tasks: set[asyncio.Task[Any]], case: object) -> None:
    """Asserts that no place, engine, slot or task has leaked."""
    state = app.state

    def held() -> list[Any]:
        engines = state.pool.engines
        return [
            state.service.places.in_flight,
            [one.name for one in state.pool.states() if one.users],
            sum(engine.running + engine.waiting for engine in engines),
            [engine.precision for engine in engines if engine.model.runner.held],
            [task for task in asyncio.all_tasks() - tasks if not task.done()],
        ]

    try:
        async with asyncio.timeout(PATIENCE):
            while any(held()):
                await asyncio.sleep(0.0005)
    except TimeoutError:
        pytest.fail(f"{case}: still held: {held()}")


@pytest.mark.parametrize(
    ("route", "fails"),
    [(route, "fault") for route in ROUTES]
    + [(route, "unload") for route in ("generate", "completions stream", "compare")],
)
def test_a_generation_fails_and_its_client_leaves(
    make_app: MakeApp, loads: Loads, watch: Watch, route: str, fails: str
) -> None:
    async def main() -> None:
        async with ready(app):
            failing = Failing(app, loads, watch)
            for (tokens, seen), steps, leaving in product(
                FAULTS if fails == "fault" else UNLOADS, STEPS, LEAVING
            ):
                async with app.state.pool.use("fp32"):
                    pass  # loaded again
                tasks = asyncio.all_tasks()
                watch.reset()
                getattr(failing, fails)(tokens)
                one = Client(app, *ROUTES[route])
                leave = partial(after, steps, partial(LEAVING[leaving], one))
                if seen == "error":
                    watch.at_error = leave
                else:
                    watch.at[tokens] = leave
                await asyncio.wait([one.task])
                watch.reset()
                one.leave()
                await nothing_is_held(app, tasks, (route, fails, tokens, seen, steps, leaving))
                failing.over()

    app = make_app()
    asyncio.run(main())


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"inputs": PROMPT * 40}),
        ("/generate", {"inputs": "x " * 2600, "truncate": 200, "max_new_tokens": 2}),
        ("/v1/completions", {"prompt": ["x " * 2100, "a"], "stream": True, "max_tokens": 2}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}),
        ("/precisions/bf16/load", {}),
    ],
)
def test_what_comes_before_a_generation_fails_and_its_client_leaves(
    make_app: MakeApp, loads: Loads, monkeypatch: pytest.MonkeyPatch, path: str, body: Any, fails: bool
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken")

    async def main() -> None:
        async with ready(app) as client:
            if fails:
                with monkeypatch.context() as patch:
                    patch.setattr(app.state.default.codec, "_tokenizer", None)
                    loads.prepare = fail
                    await leave_at_every_step()
                loads.prepare = lambda runner: None
            else:
                await leave_at_every_step()
            app.state.pool.state("bf16").failed_at = 0.0  # it may be retried at once
            await at_rest(app, client, "bf16")

    async def leave_at_every_step() -> None:
        app.state.default.codec.token_length = None  # long texts are encoded, in a thread
        for steps in range(0, 24, 2):
            for leaving in LEAVING:
                await app.state.pool.unload("bf16")
                tasks = asyncio.all_tasks()
                one = Client(app, path, body)
                after(steps, partial(LEAVING[leaving], one))
                await asyncio.wait([one.task])
                await nothing_is_held(app, tasks, (path, fails, steps, leaving))

    app = make_app()
    asyncio.run(main())


@pytest.mark.parametrize("command", [["sleep", "60"], ["false"]])
def test_a_report_ends_with_its_reader(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setattr("server.report.background.start_command", lambda *_: command)

    others = set(psutil.Process().children())  # of tests before this one

    async def main() -> None:
        async with ready(app) as client:
            for steps in (0, 6, 24):
                for leaving in LEAVING:
                    tasks = asyncio.all_tasks()
                    one = Client(app, "/report", {"plots": False})
                    after(steps, partial(LEAVING[leaving], one))
                    await asyncio.wait([one.task])
                    await until(lambda: set(psutil.Process().children()) <= others)
                    await nothing_is_held(app, tasks, (command, steps, leaving))
            monkeypatch.setattr(
                "server.report.background.start_command", lambda *_: [sys.executable, "-c", ""]
            )
            reply = await client.post("/report", json={"plots": False})
            assert "its process ended" in reply.text

    app = make_app()
    asyncio.run(main())
