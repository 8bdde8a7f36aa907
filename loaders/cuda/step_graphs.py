"""The captured steps of one runner: a graph per bucket, captured on the first call, then replayed."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from loaders.cuda import buckets
from loaders.cuda.cuda_graphs import Graphs, Replay, forget, release_unused

Key = tuple[Any, ...]
"""A step: ("decode", rows, columns) or ("prefill", tokens, columns, logits)."""


class StepGraphs:
    """The sizes of the steps, and the graph of each size.

    Args:
        graphs: captures; None runs every step eagerly.
        why_not: the reason that ``report`` gives when ``graphs`` is None.
        slots, context, device: of the runner.
        batch_invariant: one size of each kind, so that the result of a row doesn't depend on the batch.
    """

    def __init__(
        self,
        graphs: Graphs | None,
        why_not: str | None,
        slots: int,
        context: int,
        batch_invariant: bool,
        device: torch.device,
    ) -> None:
        self.batches = buckets.batch_sizes(slots, batch_invariant)
        self.contexts = buckets.contexts(context)
        self.chunks = buckets.prompt_sizes(context, batch_invariant)
        self.nbytes = 0
        self._graphs, self._why_not, self._device = graphs, why_not, device
        self._replays: dict[Key, Replay] = {}
        self._prepared = False

    def prepare(self, work: Callable[[Key], Replay]) -> None:
        """On the first call, captures every step; if one can't be captured, all run eagerly.

        Largest first, so that the smaller graphs fit the memory of the larger.
        """
        if self._prepared:
            return
        self._prepared = True
        if self._graphs is None:
            return
        try:
            for key in self._keys():
                self._replays[key] = self._graphs.capture(work(key))
        except Exception as error:
            self._why_not = _first_line(error)
        if self._why_not is not None:  # after the except block, whose traceback holds tensors
            forget(self._replays)
            if self._device.type == "cuda":
                release_unused()
            return
        with contextlib.suppress(Exception):  # a figure for /stats is not worth losing the graphs
            self.nbytes = self._graphs.nbytes

    def get(self, key: Key) -> Replay | None:
        """The replay of a step; None if it runs eagerly."""
        return self._replays.get(key)

    @property
    def replays(self) -> Mapping[Key, Replay]:
        return self._replays

    def report(self) -> Mapping[str, Any]:
        return {
            "captured": bool(self._replays),
            "not_captured_because": self._why_not,
            "graphs": len(self._replays),
            "graph_bytes": self.nbytes,
            "batch_sizes": list(self.batches),
            "batch_invariant": len(self.batches) == 1,
        }

    def close(self) -> None:
        """Drops the graphs, once the device has finished with them."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # a graph must not be freed while it runs
        forget(self._replays)
        self._graphs, self.nbytes = None, 0

    def _keys(self) -> Iterator[Key]:
        for visible in reversed(self.contexts):
            for rows in reversed(self.batches):
                yield "decode", rows, visible
            for tokens in reversed(self.chunks):
                yield "prefill", tokens, visible, "last"
                yield "prefill", tokens, visible, "none"


def _first_line(error: Exception) -> str:
    """Why a capture failed: CUDA's errors go on with advice for debugging."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}".rstrip(": ")
