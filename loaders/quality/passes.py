"""The passes of a model over a text: batches of windows, bounded in memory."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from loaders.quality.errors import QualityError
from loaders.runner import DeviceRunner, LengthRunner, Runner
from loaders.texts.text import Window

MOST_LOGITS = 2**26
"""Logits of one model held at a time, in float32: 256 MB, and as much for the other model."""
MOST_TOKENS = 2**14
"""Most tokens of a pass, whatever ``batch`` is; bounds the activations."""
PAYS, PAYS_ON_A_DEVICE = 2**10, 2**13
"""Tokens of a pass above which more bring little speed: measured on two cores, assumed for accelerators."""


class ScoredModel(Protocol):
    """What is scored: a ``LoadedModel``, or another engine's."""

    @property
    def precision(self) -> str:
        """Its name in results and errors."""
        ...

    @property
    def runner(self) -> Runner: ...

    @property
    def details(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Passes:
    """Windows of ``window`` tokens, ``stride`` apart, at most ``batch`` per pass.

    At most ``rows`` tokens have logits at a time.
    """

    window: int
    stride: int
    batch: int
    rows: int

    @classmethod
    def of(
        cls, models: Sequence[ScoredModel], window: int | None, stride: int | None, batch: int | None = None
    ) -> "Passes":
        """Passes that fit all models: by default their context, half of it, and as many as speed it up.

        Raises:
            QualityError: they do not fit.
        """
        context = min(model.runner.context for model in models)
        window = context if window is None else window
        stride = max(1, window // 2) if stride is None else stride
        if not 2 <= window <= context:
            raise QualityError(f"a window has from 2 to {context} tokens, the models' context; not {window}")
        if not 1 <= stride <= window:
            raise QualityError(f"the stride goes from 1 to the window's {window} tokens; not {stride}")
        if batch is not None and batch < 1:
            raise QualityError(f"at least one window is computed at a time; not {batch}")
        rows = max(1, MOST_LOGITS // max(model.runner.vocabulary for model in models))
        fitting = min(MOST_TOKENS // window, rows // min(stride, window - 1))
        return cls(window, stride, max(1, min(fitting, batch or _paying(models, window))), rows)


def _paying(models: Sequence[ScoredModel], window: int) -> int:
    """Windows per pass beyond which more bring little speed."""
    if any(model.details.get("outlier_threshold") for model in models):
        return 1  # int8 finds outlier columns over the whole pass: windows would affect each other
    on_a_device = all(isinstance(model.runner, DeviceRunner) for model in models)
    return (PAYS_ON_A_DEVICE if on_a_device else PAYS) // window


class Scorer:
    """Computes the windows with one model and adds up the seconds."""

    def __init__(self, model: ScoredModel, passes: Passes) -> None:
        self.model, self.seconds = model, 0.0
        self._rows = passes.rows

    def logits(self, batch: Sequence[Window]) -> Iterator[Tensor]:
        """Yields (tokens, vocabulary) logits that predict the scored tokens, window after window.

        The sizes of the pieces are the same for every model. No reference to a piece is kept here.
        """
        for piece in self._pieces(batch):
            yield self._timed(piece)

    def _timed(self, piece: Callable[[], Tensor]) -> Tensor:
        started = time.perf_counter()
        found = piece()
        if found.is_cuda:
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - started
        return found

    def _pieces(self, batch: Sequence[Window]) -> Iterator[Callable[[], Tensor]]:
        texts = [window.ids[:-1] for window in batch]  # the last token predicts nothing
        first, kept = batch[0].first - 1, len(batch[0].scored)
        if len(batch) * kept <= self._rows:
            yield lambda: self.model.runner.score_together(texts, kept).flatten(0, 1)
            return
        for ids in texts:
            for start in range(first, len(ids), self._rows):
                yield partial(self._chunk, ids, first, start)

    def _chunk(self, ids: Sequence[int], first: int, start: int) -> Tensor:
        """Computes part of a window with more logits than may be held at a time, in a slot."""
        runner, rows = self.model.runner, self._rows
        if start == first:
            if isinstance(runner, LengthRunner):
                runner.expect(0, len(ids))
            for at in range(0, first, rows):
                runner.prefill(0, ids[at : min(at + rows, first)], "none")
        logits = runner.prefill(0, ids[start : start + rows], "all")
        assert logits is not None
        if start + rows >= len(ids):
            runner.free(0)
        return logits
