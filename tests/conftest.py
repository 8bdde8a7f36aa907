"""The service on a model without weights: in process, and behind a real socket."""

import os

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    # before torch is imported: workers that compute with every core wait for each other in each parallel
    # region, and tests of small models take up to 40 times as long
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import asyncio
import gc
import logging
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import hypothesis
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from loaders import kernels
from loaders.base import LoadedModel, ModelSpec, Progress, ignore_progress
from loaders.checkpoint import open_checkpoint
from loaders.litert import environment
from server.http.connection.listening import Server
from server.http.server_config import ServerConfig
from server.settings.server import Settings
from tests import checkpoints
from tests.fakes import FakeRunner, fake_checkpoint, fake_model

if TYPE_CHECKING:
    from tests.forked_python import ForkedPython  # which imports this module

# a busy host takes any time for an example
hypothesis.settings.register_profile("any host", deadline=None)
hypothesis.settings.load_profile("any host")
PATIENCE = 60.0
"""Seconds until a test gives up waiting for what should happen: only a failure takes as long, on any host."""
CONVERTER = environment.default_folder()
"""The user's, for slow tests. For others LiteRT's precisions are unavailable: they may not install it."""
os.environ[environment.FOLDER] = str(CONVERTER.with_name("no-converter"))


def pytest_collection_finish() -> None:
    """Exempts what stays from garbage collection: a million objects, which each full collection traverses."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def process_logging() -> Iterator[None]:
    """Restores the process's logging, which a command configures for its test's stderr."""
    root, packages = logging.getLogger(), [logging.getLogger(name) for name in ("server", "loaders")]
    handlers, levels = root.handlers[:], [(logger, logger.level) for logger in (root, *packages)]
    yield
    root.handlers[:] = handlers
    for logger, level in levels:
        logger.setLevel(level)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty user cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def small_spec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """A small checkpoint of each family; GPT-2 has compiled kernels of its own."""
    model = {"gpt2": checkpoints.gpt2, "llama": checkpoints.llama}[request.param]()
    folder = checkpoints.save(model, tmp_path_factory.mktemp(request.param))
    text, artifacts = checkpoints.calibration_text(folder), tmp_path_factory.mktemp("artifacts")
    return ModelSpec(
        open_checkpoint(str(folder)), slots=4, calibration=text, artifacts=artifacts, training_steps=2
    )


@pytest.fixture(scope="module", params=kernels.runnable())
def library(request: pytest.FixtureRequest) -> kernels.Library:
    """Every kernel library that this CPU can run, not only the best one."""
    found = kernels.load(request.param)
    assert isinstance(found, kernels.Library), found
    return found


class Loads:
    """Replaces ``loaders.load``: records the loads, and the runners by precision."""

    def __init__(self) -> None:
        self.runners: dict[str, FakeRunner] = {}
        self.names: list[str] = []
        self.prepare: Callable[[FakeRunner], None] = lambda runner: None

    def __call__(self, precision: str, spec: ModelSpec, progress: Progress = ignore_progress) -> LoadedModel:
        self.names.append(precision)
        progress("loading", 1, 1)
        runner = self.runners[precision] = FakeRunner(spec.slots, spec.max_tokens)
        self.prepare(runner)
        return fake_model(precision, runner)


@pytest.fixture
def loads() -> Loads:
    return Loads()


@pytest.fixture
def make_app(tmp_path: Path, loads: Loads) -> Callable[..., FastAPI]:
    """Creates apps with given settings; ``fp32`` and ``bf16`` are loaded at the start."""

    def make(**values: Any) -> FastAPI:
        from server.app import create_app  # here, so that other tests don't import the whole app

        settings = Settings(**{"precisions": "fp32,bf16", "device": "cpu", **values})
        return create_app(settings, open_checkpoint=lambda *_: fake_checkpoint(tmp_path), load=loads)

    return make


@pytest.fixture
def make_client(make_app: Callable[..., FastAPI]) -> Iterator[Callable[..., TestClient]]:
    """Creates clients of ready apps."""
    entered: list[TestClient] = []

    def make(**values: Any) -> TestClient:
        client = TestClient(app := make_app(**values), raise_server_exceptions=False)
        client.__enter__()
        entered.append(client)
        pool = app.state.pool
        wait_until(lambda: pool.state(pool.default).engine)
        wait_until(lambda: client.get("/health").status_code == 200)
        return client

    yield make
    for client in entered:
        client.__exit__(None, None, None)


@pytest.fixture
def client(make_client: Callable[..., TestClient]) -> TestClient:
    return make_client()


@pytest.fixture
def make_chatty(make_client: Callable[..., TestClient], tmp_path: Path) -> Callable[..., TestClient]:
    """Like ``make_client``, for a model with a chat template."""

    def make(**values: Any) -> TestClient:
        from tests.routes.openai.test_openai import TEMPLATE

        file = tmp_path / "template.jinja"
        file.write_text(TEMPLATE)
        return make_client(**{"chat_template": file, **values})

    return make


@pytest.fixture(scope="session")
def forked_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator["ForkedPython"]:
    """A Python for subprocesses that have nothing to import."""
    from tests.forked_python import ForkedPython

    python = ForkedPython(tmp_path_factory.mktemp("python"))
    yield python
    python.close()


@pytest.fixture
def forked_processes(forked_python: "ForkedPython", monkeypatch: pytest.MonkeyPatch) -> None:
    """What is started as another process of this Python has nothing to import."""
    monkeypatch.setattr(sys, "executable", str(forked_python.path))


@pytest.fixture
def live(make_app: Callable[..., FastAPI]) -> Iterator[str]:
    """The address of a server behind a real socket."""
    with serving(make_app()) as address:
        yield address


@contextmanager
def serving(app: FastAPI, send_buffer: int | None = None, port: int = 0, **options: Any) -> Iterator[str]:
    """Serves an app on a socket; ``send_buffer``: its SO_SNDBUF in bytes; ``options``: uvicorn's."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if send_buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        listener.bind(("127.0.0.1", port))
        server = Server(ServerConfig(app, app.state.settings, **options))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            wait_until(lambda: server.started)
            pool = app.state.pool
            wait_until(lambda: pool.state("fp32").state == "loaded")
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(PATIENCE)


@asynccontextmanager
async def entered(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the app in the same event loop, for concurrent requests; bodies arrive whole."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test", timeout=None) as client,
    ):
        states = [app.state.pool.state(name) for name in app.state.settings.precisions]
        await until(lambda: all(state.state == "loaded" for state in states))
        yield client


async def until(condition: Callable[[], Any], seconds: float = PATIENCE) -> None:
    """Like ``wait_until``, for coroutines."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


async def at_rest(app: FastAPI, client: httpx.AsyncClient, precision: str = "fp32") -> None:
    """Waits until nothing runs, waits or holds a slot, and asserts that a plain request is served."""
    state = app.state
    await until(lambda: not state.service.places.in_flight)
    await until(lambda: not any(engine.running + engine.waiting for engine in state.pool.engines))
    await until(lambda: not any(engine.model.runner.held for engine in state.pool.engines))
    reply = await client.post(
        "/generate", json={"inputs": "abc", "max_new_tokens": 2, "precision": precision}
    )
    counts = {"prompt_tokens": 3, "cached_tokens": 0, "generated_tokens": 2}
    assert reply.json()["usage"] == counts, reply.text


def wait_until(condition: Callable[[], Any], seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not become true"
        time.sleep(0.003)
