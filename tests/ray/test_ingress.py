"""What the router answers itself, without a cluster."""

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

pytest.importorskip("ray", reason="Ray is not installed: pip install 'bitdial[ray]'")
from server.observability.exposition import PLAIN_TYPE, expose
from server.observability.metrics import Metrics
from server.ray.exchange import Forwarded
from server.ray.ingress import create_ingress
from server.settings.server import Settings

PROMETHEUS = (
    "application/openmetrics-text;version=1.0.0;q=0.6,application/openmetrics-text;version=0.0.1;q=0.5,"
    "text/plain;version=1.0.0;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
"""What it sends with each scrape."""


class FakeFleet:
    """Two replicas, whose ``/metrics`` has the format that a request asks for, as the app's has."""

    default, names = "fp32", ("fp32",)

    def __init__(self) -> None:
        self._metrics = Metrics("model")
        self._metrics.set_load("fp32", 1, 2)

    async def everywhere(self, name: str, method: str, request: Forwarded, seconds: float) -> list[Any]:
        accept = dict(request.headers).get(b"accept", b"").decode()
        text = expose([self._metrics], accept).body.decode()
        return [("one", text), ("two", text)]


@pytest.mark.parametrize("accept", [PROMETHEUS, "*/*"])
def test_prometheus_can_scrape_the_router(accept: str) -> None:
    app = create_ingress(Settings(device="cpu"), FakeFleet())  # type: ignore[arg-type]
    with TestClient(app) as client:
        page = client.get("/metrics", headers={"Accept": accept})
    assert page.status_code == 200
    assert page.headers["content-type"] == PLAIN_TYPE
    samples = {one.name: one.value for f in text_string_to_metric_families(page.text) for one in f.samples}
    assert samples["bitdial_requests_waiting"] == 4
