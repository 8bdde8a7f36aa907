"""Which precision a request asks for, by field, header or model name."""

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

ANY_MODEL = "tgi"


_ANY_MODEL = (ANY_MODEL, "dummy", "[UNUSED]")
"""What Hugging Face's clients and their documentation call the served model when only an address is known."""


@dataclass(frozen=True)
class PrecisionChoice:
    """The precision that a request gets, None for the default; and why, where the server chose it."""

    precision: str | None = None
    choice: Choice | None = None


_DEFAULT = PrecisionChoice()


def model_names(model_id: str) -> tuple[str, ...]:
    """Names the served model answers to: as configured, and without its owner."""
    return model_id, model_id.rsplit("/", 1)[-1]


def precision_of_model(name: str | None, model_id: str) -> str | None:
    """The precision a model name asks for: ``gpt2:int8`` → ``int8``, ``gpt2`` → None.

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
    """The precision asked for, perhaps ``AUTO``; None where nothing asks for one.

    It may stand in the body, the header, the query and the model's name (in the path or ``model``).

    Raises:
        BadPrecision: no such precision, or two places disagree.
        UnknownModel: the name is not the served model's.
    """
    model_id = request.app.state.checkpoint.model_id
    names = [name for name in (request.path_params.get("model"), model) if name is not None]
    names = [name for name in names if not _is_address(name, request)]
    asked: list[object] = [body["precision"]] if "precision" in body else []
    asked += request.headers.getlist("x-precision") + request.query_params.getlist("precision")
    asked += [found for name in names if (found := precision_of_model(name, model_id)) is not None]
    chosen = {name if name == AUTO else known_precision(name): None for name in asked}
    if len(chosen) > 1:
        raise BadPrecision(f"the request names different precisions: {', '.join(chosen)}")
    return next(iter(chosen), None)


def _is_address(name: str, request: Request) -> bool:
    """Whether a model's name is this server's own address, as ``@huggingface/inference`` sends it."""
    with suppress(ValueError):
        address = urlsplit(name)
        host = request.headers.get("host", "")
        return address.scheme in ("http", "https") and address.netloc.lower() == host.lower() != ""
    return False


def resolve_precision(request: Request, name: str | None, wish: AutoBounds | None) -> PrecisionChoice:
    """What a request gets that asked for ``name``, with bounds of its own or those of the server.

    Raises:
        Invalid: bounds beside the name of a precision; or none keeps to them.
        Unavailable: there is no report to choose by.
    """
    state = request.app.state
    if name not in (None, AUTO) and wish is not None:
        raise Invalid('auto goes with precision "auto", not with a named one', param="auto")
    if name is None and wish is None:
        return PrecisionChoice(None, state.default_choice)
    if name not in (None, AUTO):
        return PrecisionChoice(name)
    bounds = bounds_of(state.settings) if wish is None else Bounds(**wish.model_dump())
    choice = choose_by_report(state.reports, state.pool.able, bounds)
    return PrecisionChoice(choice.precision, choice)
