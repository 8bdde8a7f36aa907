"""``precision: "auto"``: chosen from the saved report by the bounds of a request or of the server."""

from collections.abc import Container

import loaders
from server.errors import Invalid, Unavailable
from server.report.background import Reports
from server.report.choice import Bounds, Choice, NoneFits, choose
from server.settings.server import Settings
from server.settings.types import AUTO


def bounds_of(settings: Settings) -> Bounds:
    """The server's bounds, for requests without any."""
    return Bounds(
        settings.auto_max_memory,
        settings.auto_max_perplexity_increase,
        settings.auto_max_kl,
        settings.auto_min_tokens_per_second,
        settings.auto_prefer,
    )


def resolve_default(settings: Settings, reports: Reports) -> tuple[Settings, Choice | None]:
    """The settings with ``AUTO`` replaced by a precision's name, and the choice, if it was ``AUTO``.

    Raises:
        Unavailable, Invalid: as ``choose_by_report``.
    """
    if settings.precision != AUTO:
        return settings, None
    able = loaders.available(settings.resolved_device())
    choice = choose_by_report(reports, able, bounds_of(settings))
    return settings.model_copy(update={"precision": choice.precision}), choice


def choose_by_report(reports: Reports, able: Container[str], bounds: Bounds) -> Choice:
    """The choice among the report's precisions.

    Args:
        able: the precisions that this host can run.

    Raises:
        Unavailable: there is no report; the message has the command that makes one.
        Invalid: no precision meets the bounds; the message names the closest.
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
