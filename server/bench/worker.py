"""A process that loads and runs what is measured: orders come as lines of JSON, answers go as lines of JSON.

    {"do": "load", "key": …, "engine": "llama.cpp", …}         →  {"weights_bytes": …}
    {"do": "run", "key": …, "prompts": [[…]], "tokens": 48}    →  {"times": […], "tokens": [[…]]}
    {"do": "unload", "key": …}                                 →  {}

An answer with "error" says what went wrong. The end of the input is the end of the process. A process of its
own, because each engine's threads wait in their own way, and would be in each other's in one.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol


class BatchEngine(Protocol):
    """Something loaded that continues a batch in lockstep."""

    weights_bytes: int | None

    def run(self, prompts: list[list[int]], tokens: int) -> tuple[list[float], list[list[int]]]:
        """Greedy. Returns seconds from the start to each step's last token, and each row's tokens."""
        ...

    def close(self) -> None: ...


class Worker:
    """Obeys orders.

    Args:
        makers: by engine; each is called with what else stands in the order to load.
        versions: of the libraries, by name.
    """

    def __init__(self, makers: Mapping[str, Callable[..., BatchEngine]], versions: Mapping[str, str]) -> None:
        self._makers, self._found = makers, dict(versions)
        self._engines: dict[str, BatchEngine] = {}

    def answer(self, order: dict[str, Any]) -> dict[str, Any]:
        """Raises nothing: a fault is an answer."""
        try:
            answered: dict[str, Any] = getattr(self, f"_{order.pop('do')}")(**order)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        return answered

    def serve(self) -> None:
        """Until the input ends."""
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print must not stand between the answers
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

    def _unload(self, key: str) -> dict[str, Any]:
        self._engines.pop(key).close()
        return {}
