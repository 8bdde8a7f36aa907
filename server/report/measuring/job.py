"""Makes one report, for ``bitdial report`` and for the server's subprocess."""

from collections.abc import Callable
from dataclasses import dataclass

import loaders
from loaders.base import Checkpoint
from loaders.checkpoint import load_tokenizer
from loaders.quality.greedy import PROMPTS
from loaders.texts import Text, held_out
from server.host import cache
from server.report import plots
from server.report.measuring.measure import Measurement, Plan, StepProgress
from server.report.measuring.speed import Pauses
from server.report.store import SavedReport
from server.report.subject import Reading, slots, subject_of
from server.settings.server import ModelSettings


@dataclass(frozen=True)
class ReportOptions:
    """What is measured.

    Args:
        precisions: empty: those that this host can run and that need no files made first.
        text: for the quality figures; None: the held-out text.
        quality, plots: whether quality is measured and plots are drawn.
        fresh: measures again what was measured before.
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
    options: ReportOptions,
    on_progress: Callable[[StepProgress], None],
    pauses: Pauses | None = None,
) -> SavedReport:
    """Measures the missing steps and draws the plots; returns the saved report.

    Raises:
        PlotsUnavailable, LoaderError, ServiceError, TextError, BenchError
        OSError: the report can't be saved.
    """
    if options.plots:
        plots.require()
    spec = settings.spec(checkpoint, slots=slots())
    text = options.text or held_out()
    saved = SavedReport(
        subject_of(spec), Reading.of(text, options.window, options.stride, options.prompts), options.fresh
    )
    cache.check_room(saved.folder)
    plan = Plan(
        spec,
        options.precisions or loaders.direct(spec.device),
        text if options.quality else None,
        load_tokenizer(checkpoint) if options.quality else None,
        options.window,
        options.stride,
        options.prompts,
    )
    Measurement(plan, saved, on_progress, pauses).run()
    if options.plots:
        plots.draw(saved.document, saved.folder)
    return saved
