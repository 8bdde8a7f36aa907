"""A fleet on Ray answers as one server does: the same requests to both, and their responses compared."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from server.settings.server import Settings
from tests.conftest import serving, wait_until
from tests.ray.conftest import SETTINGS, Cluster

pytestmark = [pytest.mark.slow, pytest.mark.ray]
TEXT = "The with statement"
GREEDY = {"inputs": TEXT, "max_new_tokens": 6, "seed": 1}
STREAM = {**GREEDY, "stream": True, "details": True}
COMPLETION = {"prompt": TEXT, "max_tokens": 6, "temperature": 0, "seed": 1}
REQUESTS: dict[str, dict[str, Any]] = {
    "plain": {"url": "/generate", "json": GREEDY},
    "in the body": {"url": "/generate", "json": {**GREEDY, "precision": "dynamic-int8"}},
    "in parameters": {
        "url": "/generate",
        "json": {"inputs": TEXT, "parameters": {"precision": "dynamic-int8"}},
    },
    "in a header": {"url": "/generate", "json": GREEDY, "headers": {"X-Precision": "dynamic-int8"}},
    "in the query": {"url": "/generate?precision=dynamic-int8", "json": GREEDY},
    "in the path": {"url": "/models/bundled:dynamic-int8/generate", "json": GREEDY},
    "in the model": {"url": "/v1/completions", "json": {**COMPLETION, "model": "bundled:dynamic-int8"}},
    "without a deployment": {"url": "/generate", "json": {**GREEDY, "precision": "bf16"}},
    "listed": {"url": "/", "json": GREEDY},
    "details": {"url": "/generate", "json": {**GREEDY, "details": True, "top_n_tokens": 2}},
    "sampled": {"url": "/generate", "json": {**GREEDY, "temperature": 0.7, "best_of": 2, "details": True}},
    "stream": {"url": "/generate_stream", "json": STREAM},
    "stream of another": {"url": "/generate", "json": {**STREAM, "precision": "dynamic-int8"}},
    "completion": {"url": "/v1/completions", "json": {**COMPLETION, "logprobs": 2, "echo": True}},
    "chunks": {"url": "/v1/completions", "json": {**COMPLETION, "stream": True, "n": 1}},
    "chat": {"url": "/v1/chat/completions", "json": {"messages": [{"role": "user", "content": "x"}]}},
    "models": {"method": "GET", "url": "/v1/models"},
    "model": {"method": "GET", "url": "/v1/models/bundled:nf4"},
    "info": {"method": "GET", "url": "/info"},
    "tokens": {"url": "/tokenize", "json": {"inputs": TEXT}},
    "live": {"method": "GET", "url": "/health/live"},
    "ready": {"method": "GET", "url": "/health"},
    "ready by name": {"method": "GET", "url": "/health?model=bundled"},
    "ready by path": {"method": "GET", "url": "/models/bundled/health"},
    "ready of another": {"method": "GET", "url": "/health?model=gpt4"},
    "precisions of another": {"method": "GET", "url": "/precisions?model=gpt4"},
    "stats of another": {"method": "GET", "url": "/stats?model=gpt4"},
    "head": {"method": "HEAD", "url": "/health/ready"},
    "document": {"method": "GET", "url": "/openapi.json"},
    "page": {"method": "GET", "url": "/", "headers": {"Accept": "text/html"}},
    "precisions": {"method": "GET", "url": "/precisions"},
    "request id": {"url": "/generate", "json": {}, "headers": {"X-Request-ID": "mine-1"}},
    "long request id": {"url": "/generate", "json": {}, "headers": {"X-Request-ID": "x" * 10_000}},
    "disagreeing": {"url": "/generate?precision=nf4", "json": {**GREEDY, "precision": "fp32"}},
    "unknown precision": {"url": "/generate", "json": {**GREEDY, "precision": "int3"}},
    "unknown field": {"url": "/generate", "json": {**GREEDY, "max_tokens": 2}},
    "unknown model": {"url": "/v1/completions", "json": {**COMPLETION, "model": "gpt4"}},
    "unavailable": {"url": "/generate", "json": {**GREEDY, "precision": "litert-int8"}},
    "fallback": {"url": "/generate", "json": {**GREEDY, "precision": "litert-int8", "fallback": True}},
    "auto without a report": {"url": "/generate", "json": {**GREEDY, "precision": "auto"}},
    "no json": {"url": "/generate", "content": b"{", "headers": {"Content-Type": "application/json"}},
    "wrong type": {"url": "/generate", "content": b"a=b", "headers": {"Content-Type": "text/plain"}},
    "too long": {"url": "/v1/completions", "json": {**COMPLETION, "prompt": "word " * 2000}},
    "too large": {"url": "/generate", "content": b"x" * 2_000_001},
    "no route": {"url": "/v1/embeddings", "json": {}},
    "no method": {"method": "DELETE", "url": "/stats"},
    "unload nothing": {"url": "/precisions/int3/unload"},
    "report": {"method": "GET", "url": "/report"},
}
_VOLATILE = {"timings", "created", "id", "request_id", "state", "usage"}
_OF_A_CONNECTION = {"date", "server", "connection", "transfer-encoding", "content-length"}
_TIMES = re.compile("x-.*-time|x-time-per-token|retry-after")


@pytest.fixture(scope="module")
def single() -> Iterator[httpx.Client]:
    """The same model in one server."""
    from server.app import create_app

    with (
        serving(create_app(Settings(**SETTINGS))) as address,  # type: ignore[arg-type]
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        wait_until(lambda: client.get("/precisions").text.count('"loaded"') >= 2)
        yield client


def comparable(response: httpx.Response) -> tuple[int, dict[str, str], Any]:
    """What two servers must agree about."""
    headers = {
        name: "" if _TIMES.fullmatch(name) else value
        for name, value in response.headers.items()
        if name not in _OF_A_CONNECTION
    }
    if not headers["x-request-id"].startswith("mine"):
        headers["x-request-id"] = str(len(headers["x-request-id"]) < 100)
    if "event-stream" in response.headers.get("content-type", ""):
        events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        return response.status_code, headers, [_stable(_parsed(event)) for event in events]
    return response.status_code, headers, _stable(_parsed(response.text))


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _stable(value: Any) -> Any:
    if isinstance(value, list):
        return [_stable(item) for item in value]
    if not isinstance(value, dict):
        return value
    # ids of tokens are numbers, those of completions random strings
    dropped = _VOLATILE - ({"id"} if type(value.get("id")) is int else set())
    return {name: _stable(one) for name, one in value.items() if name not in dropped}


@pytest.mark.parametrize("name", REQUESTS)
def test_the_responses_are_those_of_one_server(name: str, client: httpx.Client, single: httpx.Client) -> None:
    request = {"method": "POST", **REQUESTS[name]}
    ours, theirs = comparable(client.request(**request)), comparable(single.request(**request))
    assert ours == theirs
    assert client.request(**request).headers.get_list("x-request-id").__len__() == 1


def test_figures_are_those_of_all_replicas(cluster: Cluster, client: httpx.Client) -> None:
    def successes() -> float:
        pattern = r'^bitdial_requests_total\{.*outcome="success",precision="fp32"\} (.*)$'
        return float((re.findall(pattern, client.get("/metrics").text, re.M) or ["0"])[0])

    before = successes()
    for _ in range(12):
        assert client.post("/generate", json=GREEDY).status_code == 200
    assert successes() == before + 12
    stats = client.get("/stats").json()
    assert stats["replicas"] == {"fp32": 2, "dynamic-int8": 2}
    assert stats["queue"]["capacity"] == 4 * 128
    assert stats["precisions"]["fp32"]["latency"]["requests"] == successes()
    assert stats["precisions"]["dynamic-int8"]["state"] == "loaded"
    alone = client.get("/stats?precision=fp32").json()
    assert list(alone["precisions"]) == ["fp32"]
    assert client.get("/stats?precision=int3").status_code == 422


def test_a_whole_model_is_unloaded_in_all_replicas(client: httpx.Client) -> None:
    states = client.post("/precisions/all/unload?model=bundled").json()
    assert {one["state"] for one in states} <= {"unloaded", "unavailable"}
    shown = {name: one["state"] for name, one in client.get("/stats").json()["precisions"].items()}
    assert (shown["fp32"], shown["dynamic-int8"]) == ("unloaded", "unloaded")
    for name in ("fp32", "dynamic-int8"):
        assert '"ready"' in client.post(f"/precisions/{name}/load").text
    shown = {name: one["state"] for name, one in client.get("/stats").json()["precisions"].items()}
    assert (shown["fp32"], shown["dynamic-int8"]) == ("loaded", "loaded")


def test_a_comparison_is_that_of_one_server(client: httpx.Client, single: httpx.Client) -> None:
    body = {"inputs": TEXT * 3, "precisions": ["dynamic-int8", "bf16"], "max_new_tokens": 30, "seed": 1}
    times = ("ttft_ms", "tokens_per_second", "memory")

    def compared(client: httpx.Client) -> Any:
        answer = client.post("/compare", json=body).json()
        for row in answer["precisions"].values():
            assert all(row.pop(name) for name in times)
        return answer

    ours, theirs = compared(client), compared(single)
    assert ours == theirs
    assert list(ours["precisions"]) == ["fp32", "dynamic-int8", "bf16"]
    table = client.post("/compare", json=body, headers={"Accept": "text/markdown"})
    assert table.text.startswith("| precision")
    wrong = {**body, "precisions": ["litert-int8"]}
    assert comparable(client.post("/compare", json=wrong)) == comparable(single.post("/compare", json=wrong))
    tolerant = client.post("/compare", json={"inputs": TEXT, "max_new_tokens": 2}).json()
    assert set(tolerant["precisions"]) == {"fp32", "dynamic-int8"}  # those deployed


def test_a_second_application_has_its_own_path_keys_and_request_router(cluster: Cluster) -> None:
    from ray import serve

    keys = {"api_key": "secret", "admin_api_key": "root"}
    cluster.deploy("keys", "/keys", 2, precisions="fp32", affinity=True, **keys)
    with httpx.Client(base_url=f"{cluster.address}/keys", timeout=60) as client:
        key = {"Authorization": "Bearer secret"}
        refused = client.post("/generate", json=GREEDY)
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert refused.json()["error_type"] == "unauthorized"
        assert client.get("/stats?api_key=secret", headers=key).status_code == 401
        assert client.get("/health").status_code == 200
        assert client.post("/generate", json=GREEDY, headers=key).json()["precision"] == "fp32"
        named = client.post("/models/bundled:fp32/v1/completions", json=COMPLETION, headers=key)
        assert named.json()["precision"] == "fp32"
        assert client.post("/precisions/bf16/load", headers=key).status_code == 401
        loaded = client.post("/precisions/bf16/load", headers={"Authorization": "Bearer root"})
        assert loaded.text.endswith('data: {"status":"ready"}\n\n')
        states = {one["name"]: one["state"] for one in client.get("/precisions", headers=key).json()}
        assert states["bf16"] == "loaded"
        # prompts that begin alike go to the replica that has their beginning cached
        beginning = "The with statement is used to wrap the execution of a block. " * 6
        for story in ("first", "second", "third", "fourth"):
            prompts = [f"{story}: {beginning}{number}" for number in range(5)]
            answers = [
                client.post("/generate", json={"inputs": prompt, "max_new_tokens": 2}, headers=key).json()
                for prompt in prompts
            ]
            cached = [answer["usage"]["cached_tokens"] for answer in answers]
            assert cached[0] == 0
            assert all(cached[1:]), cached
    serve.delete("keys")
