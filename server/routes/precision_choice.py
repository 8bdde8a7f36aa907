"""A request's model and precision: from its body, header, query or path, or chosen by the report."""

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request

from server.errors import BadPrecision, Invalid, UnknownModel
from server.report.auto import bounds_of, choose_by_report
from server.report.choice import Bounds, Choice
from server.routes.schemas import AutoBounds
from server.served_model import ServedModel
from server.service.precision_state import known_precision
from server.settings.types import AUTO
from server.state import state_of

ANY_MODEL = "tgi"
_CHOSEN = "bitdial.model"
_ANY_MODEL = (ANY_MODEL, "dummy", "[UNUSED]")
"""Model names of Hugging Face's clients and documentation for an endpoint whose model is unknown to them."""


@dataclass(frozen=True)
class PrecisionChoice:
    """The resolved precision, None for the default, and the reason if the server chose it."""

    precision: str | None = None
    choice: Choice | None = None


_DEFAULT = PrecisionChoice()


def model_of(request: Request) -> ServedModel:
    """The model that ``choose_precision`` or ``choose_model`` has found; else the default one."""
    found = request.scope.get(_CHOSEN)
    return found if isinstance(found, ServedModel) else state_of(request.app).default


def choose_model(request: Request) -> ServedModel:
    """The model that the path or the query names; else the default one.

    Raises:
        UnknownModel
        Invalid: they name different ones.
    """
    _named(request, None)
    return model_of(request)


def choose_precision(request: Request, body: Mapping[str, Any], model: object = None) -> str | None:
    """The requested precision, possibly ``AUTO``; None if the request names none. Sets ``model_of``.

    Read from the body, the header, the query and the model's name (in the path, the query or ``model``).

    Raises:
        BadPrecision: no such precision, or two of these places disagree.
        UnknownModel: not the name of a served model.
        Invalid: the request names different models.
    """
    return _one_precision(request, body, _named(request, model if isinstance(model, str) else None))


def named_precision(
    request: Request, body: Mapping[str, Any], model: object, served: Collection[str]
) -> str | None:
    """As ``choose_precision``, for an app that has no models itself.

    Args:
        served: the models' names.
    """
    _, precisions = _names_in(request, model if isinstance(model, str) else None, served)
    return _one_precision(request, body, precisions)


def _one_precision(request: Request, body: Mapping[str, Any], of_models: list[str]) -> str | None:
    requested: list[object] = [body["precision"]] if "precision" in body else []
    requested += request.headers.getlist("x-precision") + request.query_params.getlist("precision")
    requested += of_models
    distinct = {name if name == AUTO else known_precision(name): None for name in requested}
    if len(distinct) > 1:
        raise BadPrecision(f"the request names different precisions: {', '.join(distinct)}")
    return next(iter(distinct), None)


def _named(request: Request, model: str | None) -> list[str]:
    """Sets ``model_of`` by all names of a model in the request; the precisions that the names end with."""
    served = state_of(request.app).models
    name, precisions = _names_in(request, model, served)
    request.scope[_CHOSEN] = None if name is None else served[name]
    return precisions


def _names_in(request: Request, model: str | None, served: Collection[str]) -> tuple[str | None, list[str]]:
    """The served model that the request names, None for the default, and all precisions in its names."""
    names = [request.path_params.get("model"), *request.query_params.getlist("model"), model]
    found = [
        split_model_name(name, served)
        for name in names
        if name is not None and not _is_address(name, request)
    ]
    models = list(dict.fromkeys(one for one, _ in found if one is not None))
    if len(models) > 1:
        raise Invalid(f"the request names different models: {', '.join(models)}", param="model")
    return next(iter(models), None), [precision for _, precision in found if precision is not None]


def split_model_name(name: str, served: Collection[str]) -> tuple[str | None, str | None]:
    """The model, None for the default, and the precision in a name: ``gpt2:int8`` → gpt2 and int8.

    Raises:
        UnknownModel: no served model.
    """
    base, colon, precision = name.rpartition(":")
    for whole, ending in ((name, None), (base if colon else "", precision)):
        if whole in _ANY_MODEL and whole not in served:
            return None, ending
        if (model := _served(whole, served)) is not None:
            return model, ending
    raise UnknownModel(f"no such model here; this server has {', '.join(served)}", param="model")


def _served(name: str, served: Collection[str]) -> str | None:
    """The model of that name, or of that name without its owner, if it is the only such one."""
    if name in served:
        return name
    without_owner = [full for full in served if full.rsplit("/", 1)[-1] == name]
    return without_owner[0] if len(without_owner) == 1 else None


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
    model = model_of(request)
    if name not in (None, AUTO) and auto is not None:
        raise Invalid('auto goes with precision "auto", not with a named one', param="auto")
    if name is None and auto is None:
        return PrecisionChoice(None, model.default_choice)
    if name not in (None, AUTO):
        return PrecisionChoice(name)
    bounds = bounds_of(model.settings) if auto is None else Bounds(**auto.model_dump())
    choice = choose_by_report(model.reports, model.pool.able, bounds)
    return PrecisionChoice(choice.precision, choice)
