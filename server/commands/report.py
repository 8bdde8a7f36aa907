"""``bitdial report``: every precision measured, and which one to run."""

import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loaders.errors import LoaderError
from loaders.quality.greedy import PROMPTS
from loaders.texts import TextError, text_file
from server.bench.errors import BenchError
from server.commands.command_line import FAILED, USAGE, UsageError, complain, parse, require
from server.commands.interrupts import say_on_interrupt
from server.commands.progress import ProgressBars
from server.errors import ServiceError
from server.report import plots
from server.report.plots import PlotsUnavailable
from server.settings.output import OutputFolder
from server.settings.server import ModelSettings
from server.settings.types import Precisions, listed, option

_REFERENCE = "fp32"
_INTERRUPTED = "bitdial report: interrupted; what was measured is kept: the same command goes on from there"
_WHAT, _HOW, _MORE = "what is measured", "how", "what is written"


class Options(ModelSettings):
    """Measure every precision of a model on this host and say which one to run.

    What was measured is kept: interrupted, it goes on where it was.
    A server of the same model on this host shows it at /report and in
    /stats, and chooses by it for precision "auto".
    """

    precisions: Precisions | None = option(
        None, _WHAT, "NAMES", "by comma, besides fp32, or all", unset="those that need no files made first"
    )
    text: Path | None = option(
        None,
        _WHAT,
        "FILE",
        "a text in UTF-8 that quality is measured on",
        unset="documentation that the bundled model was not trained on",
    )
    quality: bool = option(True, _WHAT, None, "measure quality; without, sizes and speeds alone")
    window: int | None = option(
        None, _HOW, "N", "tokens computed in one pass over the text", unset="the model's context", ge=2
    )
    stride: int | None = option(None, _HOW, "N", "tokens between passes", unset="half the window", ge=1)
    prompts: int = option(PROMPTS, _HOW, "N", "prompts that are continued greedily", ge=0)
    fresh: bool = option(False, _HOW, None, "measure anew what was measured before")
    out: OutputFolder | None = option(
        None, _MORE, "FOLDER", "Markdown, JSON, an HTML page and the plots", unset="only the saved report"
    )
    plots: bool = option(
        True, _MORE, None, "draw plots; without matplotlib none are drawn unless this is given"
    )

    def names(self) -> tuple[str, ...]:
        """Precisions measured besides fp32."""
        return listed(self.precisions, self.resolved_device())

    def draws(self) -> bool:
        """Raises: PlotsUnavailable, where ``--plots`` was given and matplotlib is missing."""
        return plots.to_draw(self.plots if "plots" in self.model_fields_set else None)


def main(arguments: Sequence[str]) -> int:
    try:
        options = parse(Options, "report", arguments)
        say_on_interrupt(_INTERRUPTED)
        require((_REFERENCE, *options.names()), options.resolved_device())
        _report(options)
    except UsageError as error:
        complain("report", error)
        return USAGE
    except PlotsUnavailable as error:
        complain("report", UsageError(f"{error}; or --no-plots"))
        return USAGE
    except (LoaderError, ServiceError, TextError, BenchError) as error:
        complain("report", error)
        return FAILED
    except OSError as error:
        complain("report", UsageError(f"it can't be written: {error.strerror}"))
        return FAILED
    return 0


def _report(options: Options) -> None:
    from loaders.checkpoint import open_checkpoint  # late: help and usage must not wait for transformers
    from server.report import files
    from server.report.measuring import job

    request = job.ReportOptions(
        options.names(),
        None if options.text is None else text_file(options.text),
        options.quality,
        options.draws(),
        options.fresh,
        options.window,
        options.stride,
        options.prompts,
    )
    bars = _Bars()
    try:
        checkpoint = open_checkpoint(options.model_id, options.revision, ProgressBars(options.model_id))
        saved = job.make(options, checkpoint, request, bars)
    finally:
        bars.close()
    _show(saved.document)
    if not request.plots and options.plots:
        print(f"\nNo plots: {plots.MISSING}")
    if options.out is not None:
        written = files.write(saved.document, saved.folder, options.out)
        print(f"\nwritten: {', '.join(map(str, written))}")


class _Bars:
    """A bar for every stage of every step."""

    def __init__(self) -> None:
        self._title, self._bars = "", ProgressBars("")

    def __call__(self, place: Any) -> None:
        title = f"[{place.step}/{place.steps}] {place.precision}"
        if title != self._title:
            self.close()
            self._title, self._bars = title, ProgressBars(title)
        self._bars(place.stage, place.current, place.total)

    def close(self) -> None:
        self._bars.close()


def _show(document: dict[str, Any]) -> None:
    from server.report.columns import cells, legend
    from server.report.markdown import advice_of, facts
    from server.report.noise import noise
    from server.report.rows import rows_of
    from server.tables import aligned
    from server.terminal import folded, terminal_width

    rows, width = rows_of(document), min(shutil.get_terminal_size().columns, 110)
    print("".join(textwrap.fill(sentence, width) + "\n\n" for sentence in noise(rows)), end="")
    print("\n".join(aligned(cells(document, rows), terminal_width())) + "\n")
    print(folded("\n".join(f"{term:<12} {meaning}" for term, meaning in legend(document))) + "\n")
    print("\n".join(textwrap.fill(fact, width, subsequent_indent="  ") for fact in facts(document)) + "\n")
    for sentence in advice_of(document).sentences:
        print(textwrap.fill(sentence, width, initial_indent="▸ ", subsequent_indent="  "))
