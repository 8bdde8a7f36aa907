"""The precision of a request: from its body, header, query or model name, or chosen by the report."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request

from server.errors import BadPrecision, Invalid, UnknownModel
from server.report.auto import bounds_of, choose_by_report
from server.report.choice import Bounds, Choice
from server.routes.schemas import AutoBounds
from server.service.precision_state import known_precision
from server.settings.types import AUTO
from server.state import state_of

ANY_MODEL = "tgi"
_ANY_MODEL = (ANY_MODEL, "dummy", "[UNUSED]")
"""Model names of Hugging Face's clients and documentation for an endpoint whose model is unknown to them."""


@dataclass(frozen=True)
class PrecisionChoice:
    """The resolved precision, None for the default, and the reason if the server chose it."""

    precision: str | None = None
    choice: Choice | None = None


_DEFAULT = PrecisionChoice()


def model_names(model_id: str) -> tuple[str, ...]:
    """Names of the served model: as configured, and without its owner."""
    return model_id, model_id.rsplit("/", 1)[-1]


def precision_of_model(name: str | None, model_id: str) -> str | None:
    """The precision in a model name: ``gpt2:int8`` → ``int8``, ``gpt2`` → None.

    Raises:
        UnknownModel: not the served model.
    """
    if name is None or name in _ANY_MODEL or name in model_names(model_id):
        return None
    base, colon, precision = name.rpartition(":")
    if not colon or base not in (*model_names(model_id), *_ANY_MODEL):
        raise UnknownModel(f"no such model here; this server has {model_id}", param="model")
    return precision


def choose_precision(request: Request, body: Mapping[str, Any], model: str | None = None) -> str | None:
    """The requested precision, possibly ``AUTO``; None if the request names none.

    Read from the body, the header, the query and the model's name (in the path or in ``model``).

    Raises:
        BadPrecision: no such precision, or two of these places disagree.
        UnknownModel: not the name of the served model.
    """
    return named_precision(request, body, model, state_of(request.app).checkpoint.model_id)


def named_precision(
    request: Request, body: Mapping[str, Any], model: str | None, model_id: str
) -> str | None:
    """As ``choose_precision``, for an app that serves ``model_id`` without having a checkpoint itself."""
    names = [name for name in (request.path_params.get("model"), model) if name is not None]
    names = [name for name in names if not _is_address(name, request)]
    requested: list[object] = [body["precision"]] if "precision" in body else []
    requested += request.headers.getlist("x-precision") + request.query_params.getlist("precision")
    requested += [found for name in names if (found := precision_of_model(name, model_id)) is not None]
    distinct = {name if name == AUTO else known_precision(name): None for name in requested}
    if len(distinct) > 1:
        raise BadPrecision(f"the request names different precisions: {', '.join(distinct)}")
    return next(iter(distinct), None)


def _is_address(name: str, request: Request) -> bool:
    """Whether a model name is this server's own URL, which ``@huggingface/inference`` sends as the model."""
    with suppress(ValueError):
        address = urlsplit(name)
        host = request.headers.get("host", "")
        return address.scheme in ("http", "https") and address.netloc.lower() == host.lower() != ""
    return False


def resolve_precision(request: Request, name: str | None, auto: AutoBounds | None) -> PrecisionChoice:
    """The precision for a request that names ``name``; ``auto`` or the server's bounds resolve ``AUTO``.

    Raises:
        Invalid: bounds together with a named precision, or no precision satisfies them.
        Unavailable: there is no report.
    """
    state = state_of(request.app)
    if name not in (None, AUTO) and auto is not None:
        raise Invalid('auto goes with precision "auto", not with a named one', param="auto")
    if name is None and auto is None:
        return PrecisionChoice(None, state.default_choice)
    if name not in (None, AUTO):
        return PrecisionChoice(name)
    bounds = bounds_of(state.settings) if auto is None else Bounds(**auto.model_dump())
    choice = choose_by_report(state.reports, state.pool.able, bounds)
    return PrecisionChoice(choice.precision, choice)
