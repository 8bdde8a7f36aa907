"""The application: deployments and their options, from the settings and the arguments of ``serve run``."""

import asyncio
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig

from server.observability.logs import set_up_logging
from server.ray.arguments import Arguments
from server.ray.configuration import Resources, checked, replica_settings
from server.ray.fleet import Fleet
from server.ray.ingress import create_ingress
from server.ray.replica import Replica
from server.report.choice import Choice
from server.settings.models import sources_of
from server.settings.server import Settings
from server.settings.types import AUTO

ROUTER = "router"
_AFFINITY = "server.ray.affinity.PrefixAffinityRouter"
_PRIVATE = {"host", "port"}
_HEADROOM = 32  # /stats, /metrics and health reach a replica whose places are all taken
_MOST_IN_ROUTER = 10_000  # the replicas' own limits come first


def build(arguments: Arguments, settings: Settings) -> serve.Application:
    """The application: a deployment for each precision loaded at start, and the router.

    Raises:
        ValueError: settings contradict each other, or those of the ``user_config`` are not valid.
        LoaderError, ServiceError: the precision is ``auto``, and can't be chosen here.
    """
    sources_of(settings)
    settings, choice = _resolved(settings)
    values = {name: getattr(settings, name) for name in settings.model_fields_set - _PRIVATE}
    # here, before replicas try it three times, each in vain
    replica_settings(values, arguments.user_config, settings.precision, Resources())
    options = _options(arguments, settings)
    engines = {
        name: serve.deployment(Replica)
        .options(name=name, **options)
        .bind(name, values, choice if name == settings.precision else None)
        for name in settings.first_precisions()
    }
    router = serve.deployment(serve.ingress()(Router)).options(
        name=ROUTER,
        max_ongoing_requests=_MOST_IN_ROUTER,
        graceful_shutdown_timeout_s=settings.graceful_termination_timeout,
        max_surge_percent=100,  # a new one starts before the old one stops
        ray_actor_options={"num_cpus": 0},  # it waits for replicas nearly all the time
    )
    application: serve.Application = router.bind(values, settings.precision, engines)
    return application


def _options(arguments: Arguments, settings: Settings) -> dict[str, Any]:
    """Options of a precision's deployment, which a file may override."""
    options: dict[str, Any] = {
        "max_ongoing_requests": settings.max_concurrent_requests + _HEADROOM,
        "max_queued_requests": settings.max_concurrent_requests,
        "graceful_shutdown_timeout_s": settings.graceful_termination_timeout,
        "ray_actor_options": {"num_cpus": arguments.num_cpus, "num_gpus": arguments.num_gpus},
        "user_config": checked(arguments.user_config),
    }
    if arguments.affinity:
        options["request_router_config"] = RequestRouterConfig(request_router_class=_AFFINITY)
    if (arguments.max_replicas or 0) > arguments.replicas:
        options["autoscaling_config"] = {
            "min_replicas": arguments.replicas,
            "max_replicas": arguments.max_replicas,
            "target_ongoing_requests": settings.max_batch_size,
        }
    else:
        options["num_replicas"] = arguments.replicas
    return options


def _resolved(settings: Settings) -> tuple[Settings, Choice | None]:
    """The settings with ``auto`` replaced by a precision, and the report's choice that gave it.

    Raises:
        LoaderError: the checkpoint can't be read here, where the application is built.
        ServiceError: there is no report on this host, or nothing within its bounds.
    """
    if settings.precision != AUTO:
        return settings, None
    from server.ray.models import wanted
    from server.report.auto import resolve_default
    from server.report.background import Reports

    first = wanted(settings, None)[0]
    reports = Reports(first.settings, first.open())
    asyncio.run(reports.find_subject())
    return resolve_default(settings, reports)


class Router:
    """The ingress. Ray Serve takes its app from ``__serve_build_asgi_app__`` once it is constructed."""

    def __init__(self, values: dict[str, Any], default: str, engines: dict[str, Any]) -> None:
        self._settings = Settings(**{**values, "precision": default})
        set_up_logging(self._settings.json_output, self._settings.log_level, self._settings.secrets())
        self._fleet = Fleet(default, engines)

    def __serve_build_asgi_app__(self) -> Any:
        return create_ingress(self._settings, self._fleet)
