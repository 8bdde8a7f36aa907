"""What Ray may do while requests run: clients that leave, replicas that end, updates."""

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
import pytest

from tests.conftest import wait_until
from tests.ray.conftest import Cluster

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


@dataclass
class Outcomes:
    """How the requests of some clients ended."""

    answered: int = 0
    refused: list[str] = field(default_factory=list)
    """Errors in the form of the API."""
    broken: list[str] = field(default_factory=list)
    """Everything else."""
    longest: float = 0.0


@contextmanager
def clients(cluster: Cluster, count: int) -> Iterator[Outcomes]:
    """Clients that send one request after another meanwhile; every second one streams."""
    outcomes, ended, lock = Outcomes(), threading.Event(), threading.Lock()

    def run(number: int) -> None:
        with httpx.Client(base_url=cluster.address, timeout=30) as client:
            while not ended.is_set():
                started = time.monotonic()
                kind, text = _request(client, stream=number % 2 == 0)
                with lock:
                    outcomes.longest = max(outcomes.longest, time.monotonic() - started)
                    if kind == "answered":
                        outcomes.answered += 1
                    else:
                        getattr(outcomes, kind).append(text)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield outcomes
    finally:
        ended.set()
        for thread in threads:
            thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


def _request(client: httpx.Client, stream: bool) -> tuple[str, str]:
    body = {"inputs": "The with statement", "max_new_tokens": 40, "ignore_eos": True, "stream": stream}
    try:
        response = client.post("/generate", json=body)
        last = response.text.rstrip().rsplit("\n\n", 1)[-1].removeprefix("data: ")
        answer = json.loads(last)
    except (httpx.HTTPError, ValueError) as error:
        return "broken", repr(error)
    if response.status_code == 200 and answer.get("generated_text") is not None:
        return "answered", ""
    return ("refused" if answer.get("error_type") else "broken"), f"{response.status_code} {last[:200]}"


def test_a_replica_that_is_killed_costs_no_request_an_answer(cluster: Cluster) -> None:
    with clients(cluster, 6) as outcomes:
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
    with clients(cluster, 4) as outcomes:
        cluster.deploy(user_config={"max_best_of": 3})  # the same processes
        wait_until(lambda: client.get("/info").json()["max_best_of"] == 3, 30)
        cluster.deploy(max_best_of=2)  # new ones
        wait_until(lambda: {client.get("/info").json()["max_best_of"] for _ in range(8)} == {2}, 60)
    assert outcomes.answered > 50
    assert not outcomes.broken
    assert not outcomes.refused
