"""The parts of ``POST /compare`` that replicas compute; Ray's object store has the reference's logits."""

import asyncio
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI

from server.errors import DeadlinePassed, ServiceError
from server.evaluation.comparison import Compared, Comparison, ComparisonRequest, Reference
from server.http.body import read_object
from server.http.validation import validate
from server.ray.exchange import Forwarded
from server.routes.compare import CompareBody, comparison_request, select
from server.routes.generation_request import merge_parameters
from server.routes.precision_choice import choose_model
from server.served_model import ServedModel
from server.service.precision_state import known_precision
from server.settings.types import ALL

ComparedOrError = Compared | ServiceError
_latest: list[Any] = []


@dataclass(frozen=True)
class ReferenceRun:
    """A finished run of the reference.

    Args:
        model: its name.
        precisions: all that are compared, the reference first.
        tolerant: one that fails has its error in its row.
        reference: an ``ObjectRef`` of a ``Reference``.
    """

    model: str
    precisions: list[str]
    tolerant: bool
    request: ComparisonRequest
    row: Compared
    reference: Any


async def run_reference(
    app: FastAPI, forwarded: Forwarded, deployed: tuple[str, ...]
) -> ReferenceRun | ServiceError:
    """Validates the request and runs its reference.

    Args:
        deployed: the precisions of a request that names none.

    Returns: an error as a value, since Ray would wrap a raised one in its own.
    """
    try:
        return await _run_reference(app, forwarded, deployed)
    except ServiceError as error:
        return error


async def _run_reference(app: FastAPI, forwarded: Forwarded, deployed: tuple[str, ...]) -> ReferenceRun:
    import ray

    request_ = forwarded.request(app)
    values, model = merge_parameters(await read_object(request_)), choose_model(request_)
    body = validate(CompareBody, values, model.settings)
    reference = known_precision(body.reference)
    named = deployed if body.precisions is None else body.precisions
    names = select(model.pool, named, reference)
    if body.precisions == ALL:
        names = list(dict.fromkeys([*names, *deployed]))
    with model.service.places.reserved():
        request = await comparison_request(model, body)
        comparison = _comparison(model, request)
        row = await _in_time(model, comparison.run(reference))
    stored = await asyncio.to_thread(ray.put, comparison.reference)
    # by gRPC the router's copy of it does not count as a use: the latest one is kept here
    _latest[:] = [stored]
    return ReferenceRun(model.name, names, body.precisions == ALL, request, row, stored)


async def compare_with(model: ServedModel, run: ReferenceRun, precision: str) -> ComparedOrError:
    """One precision compared with a run of the reference; an error as a value."""
    try:
        reference: Reference = await run.reference
        with model.service.places.reserved():
            comparison = _comparison(model, run.request, reference)
            return await _in_time(model, comparison.run(precision))
    except ServiceError as error:
        return error


def _comparison(
    model: ServedModel, request: ComparisonRequest, reference: Reference | None = None
) -> Comparison:
    return Comparison(request, model.codec, model.pool.use, model.service.observe, reference)


async def _in_time(model: ServedModel, run: Any) -> Compared:
    try:
        async with asyncio.timeout(model.settings.request_timeout):
            found: Compared = await run
            return found
    except TimeoutError:
        raise DeadlinePassed("the comparison's time was up") from None
