"""One report from its options to what is kept: for the command, and for the server's process."""

from collections.abc import Callable
from dataclasses import dataclass

import loaders
from loaders.base import Checkpoint
from loaders.checkpoint import load_tokenizer
from loaders.quality import Text, held_out
from loaders.quality.greedy import PROMPTS
from server.host import cache
from server.report import plots
from server.report.measuring.measure import Measurement, Place, Plan
from server.report.measuring.speed import Pauses
from server.report.store import Kept
from server.report.subject import Reading, slots, subject_of
from server.settings.server import ModelSettings


@dataclass(frozen=True)
class Wishes:
    """What is to be measured.

    Args:
        precisions: all that this host can run if empty.
        text: what quality is measured on; the held-out one if None.
        quality, plots: whether there are to be any.
        fresh: measure anew what was measured before.
    """

    precisions: tuple[str, ...] = ()
    text: Text | None = None
    quality: bool = True
    plots: bool = True
    fresh: bool = False
    window: int | None = None
    stride: int | None = None
    prompts: int = PROMPTS


def make(
    settings: ModelSettings,
    checkpoint: Checkpoint,
    wishes: Wishes,
    tell: Callable[[Place], None],
    pauses: Pauses | None = None,
) -> Kept:
    """Measures what is missing and draws the plots.

    Raises:
        PlotsUnavailable, LoaderError, ServiceError, QualityError, BenchError
        OSError: it can't be kept.
    """
    if wishes.plots:
        plots.require()
    spec = settings.spec(checkpoint, slots=slots())
    text = wishes.text or held_out()
    kept = Kept(
        subject_of(spec), Reading.of(text, wishes.window, wishes.stride, wishes.prompts), wishes.fresh
    )
    cache.check_room(kept.folder)
    plan = Plan(
        spec,
        wishes.precisions or loaders.available(spec.device),
        text if wishes.quality else None,
        load_tokenizer(checkpoint) if wishes.quality else None,
        wishes.window,
        wishes.stride,
        wishes.prompts,
    )
    Measurement(plan, kept, tell, pauses).run()
    if wishes.plots:
        plots.draw(kept.document, kept.folder)
    return kept
