"""The peers' process, and each of its engines as something to measure."""

import asyncio
import json
import os
import subprocess
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

from server.bench.contenders import Contender, Prompts
from server.bench.errors import BenchError
from server.bench.figures import Run

ROOT = Path(__file__).resolve().parents[3]
PAIRS: dict[str, list[tuple[str, str]]] = {
    "fp32": [("llama.cpp", "f32"), ("CTranslate2", "float32")],
    "dynamic-int8": [("llama.cpp", "Q8_0"), ("CTranslate2", "int8")],
    "int8": [("llama.cpp", "Q8_0"), ("CTranslate2", "int8")],
    "nf4": [("llama.cpp", "Q4_0")],
}
"""What a precision is measured beside: (engine, its format) of the nearest kind."""
# appended, so that the environment's own packages go before those of the one this project is installed in
_START = "import sys; sys.path.append({root!r}); from server.bench.peers.worker import main; main()"


class PeersProcess:
    """Started at once; ends with ``close``.

    Args:
        python: interpreter of the peers' environment.
        export: folder of the exported checkpoint; converted files are kept there, too.
        threads: of a forward pass.
    """

    def __init__(self, python: Path, export: Path, threads: int) -> None:
        self._export, self._threads = export, threads
        keep = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        self._process = subprocess.Popen(
            [str(python), "-c", _START.format(root=str(ROOT))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=keep,
        )
        self.versions: dict[str, str] = self.ask(do="versions")

    def ask(self, **order: Any) -> dict[str, Any]:
        """Sends an order and waits for its answer.

        Raises:
            BenchError: it failed, or the process is gone.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(order), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise BenchError(f"the peers' process ended (exit status {self._process.wait()})")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchError(f"peers: {answer['error']}")
        return answer

    def contenders(self, precision: str) -> list[Callable[[], Awaitable[Contender]]]:
        """What to measure beside that precision; each is loaded when it is made."""
        return [partial(self._contender, engine, kind) for engine, kind in PAIRS.get(precision, [])]

    async def _contender(self, engine: str, kind: str) -> Contender:
        key = f"{engine} {kind}"
        export, threads = str(self._export), self._threads
        answer = await asyncio.to_thread(
            self.ask, do="load", key=key, engine=engine, kind=kind, export=export, threads=threads
        )
        return PeerContender(self, key, answer["weights_bytes"])

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class PeerContender:
    """One engine of the peers' process; times are taken there, as its own user would."""

    def __init__(self, process: PeersProcess, key: str, weights_bytes: int | None) -> None:
        self._process, self.name, self.weights_bytes = process, key, weights_bytes

    async def run(self, prompts: Prompts, tokens: int) -> Run:
        answer = await asyncio.to_thread(
            self._process.ask, do="run", key=self.name, prompts=prompts, tokens=tokens
        )
        return Run([answer["times"]] * len(prompts), answer["times"][0], answer["tokens"])

    async def close(self) -> None:
        self._process.ask(do="unload", key=self.name)
