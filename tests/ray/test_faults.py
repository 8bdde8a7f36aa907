"""What Ray may do while requests run: clients that leave, replicas that end, updates."""

import re
import time

import httpx
import pytest

from tests.conftest import wait_until
from tests.ray.conftest import Cluster
from tests.ray.traffic import clients

pytestmark = [pytest.mark.slow, pytest.mark.ray]
LONG = {"prompt": "The with statement", "max_tokens": 480, "n": 4, "ignore_eos": True, "seed": 1}


def cancelled(client: httpx.Client) -> float:
    pattern = r'^bitdial_requests_total\{.*outcome="cancelled",precision="fp32"\} (.*)$'
    return float((re.findall(pattern, client.get("/metrics").text, re.M) or ["0"])[0])


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slots(client: httpx.Client, stream: bool) -> None:
    before = cancelled(client)
    tokens = client.get("/stats").json()["precisions"]["fp32"]["throughput"]["generated_tokens"]
    body = {**LONG, "stream": stream}
    if stream:
        with client.stream("POST", "/v1/completions", json=body) as response:
            assert next(response.iter_lines()).startswith("data: ")
    else:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json=body, timeout=0.2)
    left = time.monotonic()
    wait_until(lambda: client.get("/stats").json()["queue"]["in_flight"] == 0, 5)
    assert time.monotonic() - left < 1.5
    wait_until(lambda: cancelled(client) == before + 4, 5)
    now = client.get("/stats").json()["precisions"]["fp32"]["throughput"]["generated_tokens"]
    assert now - tokens < 4 * 480


def test_a_replica_that_is_killed_costs_no_request_an_answer(cluster: Cluster) -> None:
    with clients(cluster.address, 6) as outcomes:
        wait_until(lambda: outcomes.answered > 20, 30)
        cluster.kill("fp32")
        killed = outcomes.answered
        wait_until(lambda: outcomes.answered > killed + 50, 60)
        wait_until(lambda: cluster.replicas().get("fp32") == 2, 90)
    assert not outcomes.broken
    assert len(outcomes.refused) <= 3  # streams that had begun; the others were computed again
    assert all("generation" in one for one in outcomes.refused), outcomes.refused


def test_an_update_of_a_running_fleet_fails_no_request(cluster: Cluster, client: httpx.Client) -> None:
    assert client.get("/info").json()["max_best_of"] == 4
    with clients(cluster.address, 4) as outcomes:
        cluster.deploy(user_config={"max_best_of": 3})  # the same processes
        wait_until(lambda: client.get("/info").json()["max_best_of"] == 3, 30)
        cluster.deploy(max_best_of=4)  # new ones, since settings are arguments of their constructor
        wait_until(lambda: {client.get("/info").json()["max_best_of"] for _ in range(8)} == {4}, 60)
    assert outcomes.answered > 50
    assert not outcomes.broken
    assert not outcomes.refused
