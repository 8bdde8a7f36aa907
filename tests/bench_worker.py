"""The ``WorkerProcess`` of the tests: an engine that counts upwards, and a library that prints."""

import os

import numpy as np

from server.bench.worker import Worker


class Counting:
    weights_bytes: int | None = 12

    def __init__(self, first: int) -> None:
        self._first = first

    def run(self, prompts: list[list[int]], tokens: int) -> tuple[list[float], list[list[int]]]:
        os.write(1, b"a library prints something\n")
        if tokens > 100:
            raise ValueError("too many")
        if tokens == 99:
            os._exit(3)
        rows = [[len(prompt) + self._first + i for i in range(tokens)] for prompt in prompts]
        return [0.1 * (i + 1) for i in range(tokens)], rows

    def score(self, texts: list[list[int]], kept: int) -> np.ndarray:
        """Of a vocabulary of two: the id, and the id plus the first."""
        ids = np.array(texts)[:, -kept:]
        return np.stack([ids, ids + self._first], -1)

    def close(self) -> None:
        pass


def main() -> None:
    Worker({"counting": Counting}, {"counting": "1.0"}).serve()
