"""A real Prometheus with the configuration of docs/deploy, and a real server process for it to scrape."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import yaml

from tests.conftest import wait_until
from tests.deploy.files import DEPLOY, PLOT, ROOT, SCRAPING

LABELS = {"namespace": "bitdial", "pod": "bitdial-0"}
"""As Kubernetes' service discovery adds them."""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def bitdial(port: int, *options: str, **variables: str) -> Iterator[None]:
    """A ready server of the bundled model, on one thread."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "THREADS": "1", "DEVICE": "cpu", **variables}
    command = [sys.executable, "-m", "server", "serve", "--port", str(port), *options]
    with subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            ready = f"http://127.0.0.1:{port}/health"
            wait_until(lambda: answers(ready) or process.poll() is not None, seconds=60)
            assert process.poll() is None, "the server ended"
            yield
        finally:
            process.terminate()


@contextmanager
def prometheus(folder: Path, jobs: Mapping[str, tuple[int, str]]) -> Iterator[str]:
    """The address of a Prometheus that scrapes a port of this host, with a key, for each job, every second.

    Its configuration is docs/deploy/prometheus.yml but for the targets, the intervals and where the key is.
    """
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("no prometheus here: install Prometheus")
    configuration = _configuration(folder, jobs)
    address = f"127.0.0.1:{free_port()}"
    command = [
        program, f"--config.file={configuration}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
    ]  # fmt: skip
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL) as process:
        try:
            ready = f"http://{address}/-/ready"
            wait_until(lambda: answers(ready) or process.poll() is not None, seconds=30)
            assert process.poll() is None, "Prometheus ended"
            yield f"http://{address}"
        finally:
            process.terminate()


def _configuration(folder: Path, jobs: Mapping[str, tuple[int, str]]) -> Path:
    (job,) = SCRAPING["scrape_configs"]
    local: list[dict[str, Any]] = []
    for name, (port, key) in jobs.items():
        file = folder / f"key of {name}"
        file.write_text(key)
        authorization = {**job["authorization"], "credentials_file": str(file)}
        static = [{"targets": [f"127.0.0.1:{port}"], "labels": LABELS}]
        local.append({**job, "job_name": name, "authorization": authorization, "static_configs": static})
        del local[-1]["dns_sd_configs"]
    shutil.copy(DEPLOY / "alerts.yml", folder)
    intervals = dict.fromkeys(SCRAPING["global"], "1s")
    (folder / "prometheus.yml").write_text(
        yaml.safe_dump({**SCRAPING, "global": intervals, "scrape_configs": local})
    )
    return folder / "prometheus.yml"


def answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def result(address: str, query: str) -> list[dict[str, Any]]:
    """The series that answer a query.

    Raises:
        AssertionError: Prometheus doesn't understand it.
    """
    try:
        return list(PLOT["ask"](address, "query", query=query)["result"])
    except HTTPError as refused:
        raise AssertionError(f"{query}: {refused.read().decode()}") from refused


def values(address: str, query: str) -> list[float]:
    """The figures that answer a query; ratios of nothing are not among them."""
    found = (float(series["value"][1]) for series in result(address, query))
    return [value for value in found if value == value]
