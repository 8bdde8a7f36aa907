"""``precision: "auto"``: the bounds of a request, or of the server, against the kept report."""

from collections.abc import Container

import loaders
from server.errors import Invalid, Unavailable
from server.report.background import Reports
from server.report.choice import Bounds, Choice, NoneFits, choose
from server.settings.server import Settings
from server.settings.types import AUTO


def bounds_of(settings: Settings) -> Bounds:
    """The server's own."""
    return Bounds(
        settings.auto_max_memory,
        settings.auto_max_perplexity_increase,
        settings.auto_max_kl,
        settings.auto_min_tokens_per_second,
        settings.auto_prefer,
    )


def resolve_default(settings: Settings, reports: Reports) -> tuple[Settings, Choice | None]:
    """The settings with a precision's name as the default, and why it is that one where it was ``AUTO``.

    Raises:
        Unavailable, Invalid: as ``choose_by_report``.
    """
    if settings.precision != AUTO:
        return settings, None
    able = loaders.available(settings.resolved_device())
    choice = choose_by_report(reports, able, bounds_of(settings))
    return settings.model_copy(update={"precision": choice.precision}), choice


def choose_by_report(reports: Reports, able: Container[str], bounds: Bounds) -> Choice:
    """
    Args:
        able: the precisions that this host can run.

    Raises:
        Unavailable: there is no report; the message says how to make one.
        Invalid: no precision keeps to the bounds; the message names the nearest.
    """
    report = reports.latest()
    if report is None:
        raise Unavailable(
            f'precision "auto" chooses by a report: {reports.how_to_make_one()}', param="precision"
        )
    try:
        return choose([row for row in report.rows if row.precision in able], bounds)
    except NoneFits as error:
        raise Invalid(str(error), param="auto") from None
