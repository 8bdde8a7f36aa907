"""A process of the peers' environment: told by lines of JSON what to load and run, answers by lines of JSON.

    {"do": "load", "key": …, "engine": "llama.cpp", "kind": "Q8_0", "export": FOLDER, "threads": 2}
                                                             →  {"weights_bytes": …}
    {"do": "run", "key": …, "prompts": [[…]], "tokens": 48}   →  {"times": […], "tokens": [[…]]}
    {"do": "unload", "key": …}

An answer with "error" says what went wrong. The end of the input is the end of the process.
"""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TextIO

from server.bench.peers.convert import Exported, write_ctranslate2, write_gguf


class Engine(Protocol):
    weights_bytes: int | None

    def run(self, prompts: list[list[int]], tokens: int) -> tuple[list[float], list[list[int]]]: ...

    def close(self) -> None: ...


class Worker:
    """Keeps what is loaded, by key."""

    def __init__(self) -> None:
        self._engines: dict[str, Engine] = {}

    def answer(self, order: dict[str, Any]) -> dict[str, Any]:
        try:
            answered: dict[str, Any] = getattr(self, f"_{order.pop('do')}")(**order)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        return answered

    def _versions(self) -> dict[str, Any]:
        return {name: version(name) for name in ("llama-cpp-python", "ctranslate2")}

    def _load(self, key: str, engine: str, kind: str, export: str, threads: int) -> dict[str, Any]:
        makers = {"llama.cpp": _llama_cpp, "CTranslate2": _ctranslate2}
        loaded = self._engines[key] = makers[engine](kind, Path(export), threads)
        return {"weights_bytes": loaded.weights_bytes}

    def _run(self, key: str, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        times, ids = self._engines[key].run(prompts, tokens)
        return {"times": times, "tokens": ids}

    def _unload(self, key: str) -> dict[str, Any]:
        self._engines.pop(key).close()
        return {}


def _llama_cpp(kind: str, export: Path, threads: int) -> Engine:
    from server.bench.peers.llama import LlamaCpp, quantize

    plain, wanted = export / "f32.gguf", export / f"{kind}.gguf"
    if not plain.exists():
        write_gguf(Exported(export), plain)
    if not wanted.exists():
        quantize(plain, kind, wanted, threads)
    return LlamaCpp(wanted, threads)


def _ctranslate2(kind: str, export: Path, threads: int) -> Engine:
    from server.bench.peers.ct2 import CTranslate2

    exported, folder = Exported(export), export / "ctranslate2"
    if not folder.exists():
        write_ctranslate2(exported, folder)
    return CTranslate2(folder, kind, threads, exported.facts["tokens"])


def serve(orders: TextIO, answers: TextIO) -> None:
    worker = Worker()
    for line in orders:
        print(json.dumps(worker.answer(json.loads(line))), file=answers, flush=True)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not stand between the answers
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
