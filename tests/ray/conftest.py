"""A cluster of Ray on this host, with two replicas of fp32 and of dynamic-int8, started once."""

import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import PATIENCE, wait_until

ROOT = Path(__file__).resolve().parent.parent.parent
SETTINGS = {"precisions": "fp32,dynamic-int8", "device": "cpu", "threads": 1}


@dataclass(frozen=True)
class Cluster:
    """An application on Ray Serve."""

    address: str

    def deploy(self, name: str = "default", prefix: str = "/", replicas: int = 2, **options: Any) -> None:
        """Deploys the application, or changes it; returns when it is ready.

        Args:
            options: settings, ``user_config`` and ``affinity``.
        """
        from ray import serve

        from server.ray.arguments import Arguments
        from server.ray.deployments import build
        from server.settings.server import Settings

        own = {field: options.pop(field) for field in ("user_config", "affinity") if field in options}
        arguments = Arguments(replicas=replicas, **own)
        serve.run(build(arguments, Settings(**{**SETTINGS, **options})), name=name, route_prefix=prefix)

    def replicas(self) -> dict[str, int]:
        found: dict[str, int] = httpx.get(f"{self.address}/stats", timeout=30).json()["replicas"]
        return found

    def kill(self, deployment: str) -> None:
        """Ends one replica's process without notice."""
        import ray

        named = ray.util.list_named_actors(all_namespaces=True)
        names = [one["name"] for one in named if f"#{deployment}#" in one["name"]]
        ray.kill(ray.get_actor(sorted(names)[0], namespace="serve"))


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'bitdial[ray]'")
    serve = pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'bitdial[ray]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(16))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "server.ray.proxy.middlewares")
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("ray-cache")))
        ray.init(
            num_cpus=8,
            include_dashboard=False,
            object_store_memory=200 * 2**20,
            log_to_driver=False,
            # short: sockets in it may have paths of 107 bytes
            _temp_dir=str(tmp_path_factory.mktemp("r")),
        )
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            started = Cluster(f"http://127.0.0.1:{port}")
            started.deploy()
            wait_until(lambda: httpx.get(f"{started.address}/health", timeout=PATIENCE).status_code == 200)
            yield started
        finally:
            serve.shutdown()
            ray.shutdown()


@pytest.fixture
def client(cluster: Cluster) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=cluster.address, timeout=60) as client:
        yield client
