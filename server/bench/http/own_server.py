"""Starts a server of this project for a measurement, and stops it."""

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from server.bench.errors import BenchError
from server.bench.http.client import Client
from server.settings.server import ModelSettings

ROOT = Path(__file__).resolve().parents[3]
_READY_SECONDS = 300.0
_LEFT_OUT = ("api_key", "admin_api_key", "model", "models", "shadow_precision", "otlp_endpoint")
"""Variables of a server that is not this one: other models, its keys, and what computes beside requests."""


@asynccontextmanager
async def own_server(
    settings: ModelSettings, precision: str, slots: int, threads: int
) -> AsyncIterator[Client]:
    """Runs ``bitdial serve`` with one precision in a process on the same CPUs; ready when entered.

    Raises:
        BenchError: it ended or did not become ready; the message has its last line of output.
    """
    with TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "server", "serve", "--port", "0"],
            env=_environment(settings, precision, slots, threads),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            client = Client(await asyncio.to_thread(_address, process, log))
            await _ready(client, process, log)
            yield client
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _environment(settings: ModelSettings, precision: str, slots: int, threads: int) -> dict[str, str]:
    values = settings.model_dump(mode="json", include=set(ModelSettings.model_fields), exclude_none=True)
    chosen = {
        **values,
        "threads": threads,
        "precision": precision,
        "precisions": precision,
        "max_batch_size": slots,
        "host": "127.0.0.1",
    }
    inherited = {name: value for name, value in os.environ.items() if name.lower() not in _LEFT_OUT}
    path = os.pathsep.join([str(ROOT), *filter(None, [inherited.get("PYTHONPATH")])])
    return inherited | {name.upper(): str(value) for name, value in chosen.items()} | {"PYTHONPATH": path}


def _address(process: "subprocess.Popen[str]", log: IO[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if match := re.search(r"listening on (http://\S+)", line):
            return match[1]
    raise _failed(log)


async def _ready(client: Client, process: "subprocess.Popen[str]", log: IO[str]) -> None:
    try:
        async with asyncio.timeout(_READY_SECONDS):
            while process.poll() is None:
                try:
                    await client.ask("GET", "/health")
                except BenchError:
                    await asyncio.sleep(0.1)
                else:
                    return
    except TimeoutError:
        pass
    raise _failed(log)


def _failed(log: IO[str]) -> BenchError:
    log.seek(0)
    last = log.read().strip().splitlines()[-1:] or ["no output"]
    return BenchError(f"the server for the measurement did not become ready: {last[0]}")
