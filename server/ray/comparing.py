"""``POST /compare`` across deployments: the reference first, then all others at once."""

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

import loaders
from loaders.errors import UnknownPrecision
from server.errors import DeadlinePassed, ServiceError
from server.http.body import parse_object
from server.ray.compared import ComparedOrError, ReferenceRun
from server.ray.exchange import Forwarded
from server.ray.fleet import Fleet
from server.routes.compare import Answer, answered

_DEFAULT_REFERENCE = "fp32"


class Comparisons:
    """Runs comparisons, one at a time: the reference's logits are kept in the object store meanwhile.

    Args:
        fleet: the deployments.
        seconds: for one comparison, waiting for others included.
    """

    def __init__(self, fleet: Fleet, seconds: float) -> None:
        self._fleet, self._seconds = fleet, seconds
        self._one = asyncio.Lock()

    async def answer(self, request: Request, forwarded: Forwarded) -> Response:
        """The response to a request for a comparison.

        Raises:
            ServiceError
        """
        try:
            async with asyncio.timeout(self._seconds), self._one:
                return answered(request, await self._compare(forwarded))
        except TimeoutError:
            raise DeadlinePassed("the comparison's time was up") from None

    async def _compare(self, forwarded: Forwarded) -> Answer:
        fleet = self._fleet
        run: ReferenceRun | ServiceError = await fleet.call(
            fleet.serving(_reference(forwarded.body)), "run_reference", forwarded, fleet.names
        )
        if isinstance(run, ServiceError):
            raise run
        reference, *others = run.precisions
        rows: list[ComparedOrError] = await asyncio.gather(
            *(self._with(forwarded, run, precision) for precision in others)
        )
        answer = Answer(reference, len(run.request.ids), run.request.params.seed, {reference: run.row})
        for precision, row in zip(others, rows, strict=True):
            if isinstance(row, ServiceError) and not run.tolerant:
                raise row
            answer.rows[precision] = row
        return answer

    async def _with(self, forwarded: Forwarded, run: ReferenceRun, precision: str) -> ComparedOrError:
        try:
            row: Any = await self._fleet.call(
                self._fleet.serving(precision), "compare_with", forwarded, run, precision
            )
        except ServiceError as error:
            return error
        compared: ComparedOrError = row
        return compared


def _reference(body: bytes) -> str | None:
    """The reference that a body names; None if it is not valid, which the replica will say."""
    try:
        return str(loaders.canonical(parse_object(body).get("reference", _DEFAULT_REFERENCE)))
    except (ServiceError, UnknownPrecision):
        return None
