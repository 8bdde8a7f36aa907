"""The servers that ``ray_figures.py`` compares: one process, and a fleet on Ray in processes of its own."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx


@contextmanager
def one_server(environment: dict[str, str]) -> Iterator[str]:
    """``bitdial serve``; yields its address."""
    port = free_port()
    command = [sys.executable, "-m", "server", "serve", "--port", str(port)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as server:
        try:
            yield ready(f"http://127.0.0.1:{port}")
        finally:
            server.terminate()


class RayFleet:
    """A cluster of Ray in processes of its own on this host."""

    def __init__(self, environment: dict[str, str], precision: str, held: ExitStack) -> None:
        import ray
        from ray import serve

        os.environ.update(environment)
        port = free_port()
        temporary = held.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        ray.init(
            num_cpus=8,
            include_dashboard=False,
            object_store_memory=200 * 2**20,
            log_to_driver=False,
            _temp_dir=temporary,
        )
        held.callback(ray.shutdown)
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        held.callback(serve.shutdown)
        self._precision = precision
        self.address = f"http://127.0.0.1:{port}"

    def deploy(self, replicas: int, **settings: Any) -> float:
        """Deploys or changes the application; returns the seconds until it is ready."""
        from ray import serve

        from server.ray.arguments import Arguments
        from server.ray.deployments import build
        from server.settings.server import Settings

        started = time.monotonic()
        serve.run(build(Arguments(replicas=replicas), Settings(**settings)))
        ready(self.address)
        return time.monotonic() - started

    def kill_one(self) -> None:
        """Ends a replica without notice."""
        import ray

        named = ray.util.list_named_actors(all_namespaces=True)
        names = sorted(one["name"] for one in named if f"#{self._precision}#" in one["name"])
        ray.kill(ray.get_actor(names[0], namespace="serve"))

    def replicas(self) -> int:
        return int(httpx.get(f"{self.address}/stats", timeout=60).json()["replicas"].get(self._precision, 0))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def ready(address: str) -> str:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        try:
            if httpx.get(f"{address}/health", timeout=5).status_code == 200:
                return address
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"{address} was not ready within two minutes")
