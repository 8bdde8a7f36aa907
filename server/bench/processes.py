"""The parent's end of ``worker``: a process, and the engines loaded in it as contenders."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

import numpy as np

from server.bench.contenders import Prompts
from server.bench.errors import BenchError
from server.bench.figures import Run
from server.host.subprocesses import start_command


class WorkerProcess:
    """A process started by the constructor on this process's CPUs, stopped on exit of the context.

    Args:
        module: its ``main`` serves.
        python: interpreter of the environment with its imports; None: this one.
    """

    def __init__(self, module: str, python: Path | str | None = None) -> None:
        environment = {
            name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")
        }
        self._process = subprocess.Popen(
            start_command(module, python or sys.executable),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __enter__(self) -> "WorkerProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def ask(self, **order: Any) -> dict[str, Any]:
        """Sends an order and waits for its answer.

        Raises:
            BenchError: the order failed, or the process has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(order), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise BenchError(f"a process of the measurement ended (status {self._process.wait()})")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchError(answer["error"])
        return answer

    async def load(self, name: str, engine: str, **options: Any) -> "RemoteContender":
        """Loads an engine, shown as ``name``."""
        answer = await asyncio.to_thread(self.ask, do="load", key=name, engine=engine, **options)
        return RemoteContender(self, name, answer["weights_bytes"])


class RemoteContender:
    """An engine in a ``WorkerProcess``, which measures the times itself."""

    def __init__(self, process: WorkerProcess, name: str, weights_bytes: int | None) -> None:
        self._process, self.name, self.weights_bytes = process, name, weights_bytes

    async def run(self, prompts: Prompts, tokens: int) -> Run:
        answer = await asyncio.to_thread(
            self._process.ask, do="run", key=self.name, prompts=prompts, tokens=tokens
        )
        return Run([answer["times"]] * len(prompts), answer["times"][0], answer["tokens"])

    def score(self, texts: Prompts, kept: int) -> np.ndarray:
        """Logits (texts, kept, vocabulary) after the last ``kept`` ids of texts of equal length, in float32.

        Raises:
            BenchError
        """
        with TemporaryDirectory(prefix="bitdial-logits-") as folder:
            file = Path(folder) / "logits.npy"
            self._process.ask(do="score", key=self.name, texts=texts, kept=kept, file=str(file))
            found: np.ndarray = np.load(file)
        return found

    async def close(self) -> None:
        self._process.ask(do="unload", key=self.name)
