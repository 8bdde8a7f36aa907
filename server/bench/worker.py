"""A process that loads and runs measured engines: reads orders and writes answers as lines of JSON.

    {"do": "load", "key": …, "engine": "llama.cpp", …}         →  {"weights_bytes": …}
    {"do": "run", "key": …, "prompts": [[…]], "tokens": 48}    →  {"times": […], "tokens": [[…]]}
    {"do": "score", "key": …, "texts": [[…]], "kept": 8, "file": …}  →  {}
    {"do": "unload", "key": …}                                 →  {}

The logits of a score are written to the file. An answer with "error" has the reason of a failure. The process
ends at the end of its input. Engines run in processes of their own because each engine's threads spin while
idle, and would slow down the others.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np


class BatchEngine(Protocol):
    """A loaded engine that continues a batch in lockstep, and scores texts of equal length."""

    weights_bytes: int | None

    def run(self, prompts: list[list[int]], tokens: int) -> tuple[list[float], list[list[int]]]:
        """Greedy. Returns seconds from the start to each step's last token, and each row's tokens."""
        ...

    def score(self, texts: list[list[int]], kept: int) -> np.ndarray:
        """Logits (texts, kept, vocabulary) after the last ``kept`` ids of each text, in float32."""
        ...

    def close(self) -> None: ...


class Worker:
    """Executes orders.

    Args:
        makers: factories by engine, called with the other fields of the load order.
        versions: of the libraries, by name.
    """

    def __init__(self, makers: Mapping[str, Callable[..., BatchEngine]], versions: Mapping[str, str]) -> None:
        self._makers, self._found = makers, dict(versions)
        self._engines: dict[str, BatchEngine] = {}

    def answer(self, order: dict[str, Any]) -> dict[str, Any]:
        """Never raises: an exception becomes an answer."""
        try:
            answered: dict[str, Any] = getattr(self, f"_{order.pop('do')}")(**order)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        return answered

    def serve(self) -> None:
        """Serves until the input ends."""
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # keeps output of libraries out of the answers
        for line in sys.stdin:
            print(json.dumps(self.answer(json.loads(line))), file=answers, flush=True)

    def _versions(self) -> dict[str, Any]:
        return self._found

    def _load(self, key: str, engine: str, **options: Any) -> dict[str, Any]:
        loaded = self._engines[key] = self._makers[engine](**options)
        return {"weights_bytes": loaded.weights_bytes}

    def _run(self, key: str, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        times, ids = self._engines[key].run(prompts, tokens)
        return {"times": times, "tokens": ids}

    def _score(self, key: str, texts: list[list[int]], kept: int, file: str) -> dict[str, Any]:
        np.save(file, self._engines[key].score(texts, kept))
        return {}

    def _unload(self, key: str) -> dict[str, Any]:
        self._engines.pop(key).close()
        return {}
