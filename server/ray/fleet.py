"""The deployments as the router sees them: calls to one replica or to all, with errors of the service."""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any

from ray.exceptions import RayActorError, RayError, TaskCancelledError, WorkerCrashedError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle

from server.errors import NotReady, Overloaded, ServiceError
from server.ray.exchange import Forwarded, Head

_log = logging.getLogger("server.ray")
_LOST = (RayActorError, WorkerCrashedError, ReplicaUnavailableError, TaskCancelledError)


class ReplicaLost(ServiceError):
    """The replica ended during the request. It can be sent to another one, if its response hasn't begun."""

    status, error_type, retry_after = 503, "unavailable", 2.0
    openai_type = "server_error"

    def __init__(self) -> None:
        super().__init__("the replica that computed this request has ended")


def service_error(error: BaseException) -> ServiceError:
    """The error of the service that one of Ray's is for a client; it tells nothing of the cluster."""
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, BackPressureError):
        return Overloaded("too many requests wait for a replica")
    if isinstance(error, DeploymentUnavailableError):
        return NotReady("the precision's replicas can't be started")
    if isinstance(error, _LOST):
        return ReplicaLost()
    _log.error("a call of a replica failed", exc_info=error)
    return ServiceError("internal error")


def _cancel(response: Any) -> None:
    with suppress(RayError, RayServeException):  # what no replica has taken raises why
        response.cancel()


class Fleet:
    """A deployment for each of some precisions; the default's serves all others.

    Args:
        default: the precision of requests that name none.
        handles: by the name of the precision.
    """

    def __init__(self, default: str, handles: Mapping[str, DeploymentHandle]) -> None:
        self.default = default
        self._handles = handles
        self._relays = {
            name: handle.options(method_name="relay", stream=True) for name, handle in handles.items()
        }

    @property
    def names(self) -> tuple[str, ...]:
        """The precisions that have a deployment, the default first."""
        return tuple(dict.fromkeys((self.default, *self._handles)))

    def serving(self, precision: str | None) -> str:
        """The deployment that serves a precision: its own, or the default one, which loads it if asked to."""
        return precision if precision is not None and precision in self._handles else self.default

    def relay(self, name: str, request: Forwarded) -> "Relay":
        """The response of one replica, in pieces."""
        return Relay(self._relays[name].remote(request))

    async def call(self, name: str, method: str, *arguments: Any) -> Any:
        """The result of a method of one replica; cancelled with the caller.

        Raises:
            ServiceError
        """
        response = self._handles[name].options(method_name=method).remote(*arguments)
        try:
            return await response
        except asyncio.CancelledError:
            _cancel(response)
            raise
        except (RayError, RayServeException) as error:
            raise service_error(error) from error

    async def everywhere(self, name: str, method: str, *arguments: Any, seconds: float) -> list[Any]:
        """The results of a method from all replicas of a deployment that return one in time."""
        try:
            response = self._handles[name].broadcast(method, *arguments)
            results = await response.results_async(timeout_s=seconds, return_exceptions=True)
        except (TimeoutError, RayError, RayServeException):
            return []
        return [result for result in results if not isinstance(result, BaseException)]


class Relay:
    """One response on its way from a replica."""

    def __init__(self, response: Any) -> None:
        self._response = response

    def cancel(self) -> None:
        """Cancels the request in the replica."""
        _cancel(self._response)

    async def __aiter__(self) -> AsyncIterator[Head | bytes]:
        """Raises: ServiceError"""
        try:
            async for item in self._response:
                yield item
        except (RayError, RayServeException) as error:
            raise service_error(error) from error
