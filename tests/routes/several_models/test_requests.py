"""Requests to several checkpoints in one server: each names its model, and is answered by that one."""

import pytest
from fastapi.testclient import TestClient

from tests.routes.several_models.conftest import BODY
from tests.two_models import SMALL, Runners

PROMPT = {"prompt": "x", "max_tokens": 3, "temperature": 0}


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/generate", "aaa"),
        ("/models/large/generate", "aaa"),
        ("/models/owner/small/generate", "bbb"),
        ("/models/small:bf16/generate", "bbb"),
        ("/generate?model=small", "bbb"),
        ("/models/tgi/generate", "aaa"),
    ],
)
def test_a_path_or_the_query_names_the_model(client: TestClient, path: str, text: str) -> None:
    answer = client.post(path, json=BODY).json()
    assert answer["generated_text"] == text
    assert answer["precision"] == ("bf16" if "bf16" in path else "fp32")


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("large", "aaa"),
        ("owner/small", "bbb"),
        ("small", "bbb"),
        ("small:bf16", "bbb"),
        ("tgi", "aaa"),
        (None, "aaa"),
    ],
)
def test_a_body_of_v1_names_it(client: TestClient, model: str | None, text: str) -> None:
    answer = client.post("/v1/completions", json={**PROMPT, "model": model}).json()
    assert answer["choices"][0]["text"] == text
    assert answer["model"] == (model or "large")


def test_streams_and_batches_come_from_the_named_model(client: TestClient) -> None:
    body = {**PROMPT, "model": "small", "stream": True}
    assert client.post("/v1/completions", json=body).text.count('"text":"b"') == 3
    answer = client.post("/v1/completions", json={**PROMPT, "prompt": ["x", "y"], "model": "small"}).json()
    assert [choice["text"] for choice in answer["choices"]] == ["bbb", "bbb"]


def test_unknown_and_different_models_are_errors(client: TestClient) -> None:
    unknown = client.post("/v1/completions", json={**PROMPT, "model": "medium"})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert unknown.json()["error"]["message"] == "no such model here; this server has large, owner/small"
    two = client.post("/models/large/v1/completions", json={**PROMPT, "model": "small"})
    assert (two.status_code, two.json()["error"]["param"]) == (400, "model")
    for path in ("/stats", "/info", "/precisions", "/report"):
        assert client.get(path, params={"model": "medium"}).status_code == 404, path


def test_the_context_is_the_models_own(client: TestClient) -> None:
    body = {**PROMPT, "prompt": "x" * 150}
    assert client.post("/v1/completions", json={**body, "model": "large"}).status_code == 200
    refused = client.post("/v1/completions", json={**body, "model": "small"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_every_model_is_listed_in_every_precision(client: TestClient) -> None:
    ids = [entry["id"] for entry in client.get("/v1/models").json()["data"]]
    assert (
        ids.index("large")
        < ids.index("large:bf16")
        < ids.index("owner/small")
        < ids.index("owner/small:bf16")
    )
    assert client.get("/v1/models/small:bf16").json()["id"] == "owner/small:bf16"
    assert client.get("/v1/models/medium").status_code == 404


def test_stats_info_and_precisions_are_of_the_model_that_the_query_names(client: TestClient) -> None:
    client.post("/generate?model=small", json=BODY)
    default, small = client.get("/stats").json(), client.get("/stats?model=small").json()
    assert default["models"] == small["models"] == ["large", "owner/small"]
    assert (default["model"]["id"], small["model"]["id"]) == ("large", "owner/small")
    assert default["precisions"]["fp32"]["latency"]["requests"] == 0
    assert small["precisions"]["fp32"]["latency"]["requests"] == 1
    assert default["memory"]["used_bytes"] == small["memory"]["used_bytes"]
    assert client.get("/info?model=small").json()["max_total_tokens"] == SMALL
    states = {one["name"]: one["state"] for one in client.get("/precisions?model=small").json()}
    assert (states["fp32"], states["bf16"]) == ("loaded", "unloaded")


def test_a_further_model_loads_its_other_precisions_when_they_are_asked_for(
    client: TestClient, runners: Runners
) -> None:
    assert ("small", "bf16") not in runners
    assert client.post("/precisions/bf16/load?model=small").text.endswith('"ready"}\n\n')
    assert ("small", "bf16") in runners
    client.post("/precisions/bf16/unload?model=small")
    assert runners["small", "bf16"].closed
    assert not runners["large", "bf16"].closed


def test_a_whole_model_is_unloaded_and_loads_again_when_it_is_asked_for(
    client: TestClient, runners: Runners
) -> None:
    client.post("/precisions/bf16/load?model=small")
    states = client.post("/precisions/all/unload?model=small").json()
    assert {one["state"] for one in states} <= {"unloaded", "unavailable"}
    assert {key for key, runner in runners.items() if runner.closed} == {("small", "fp32"), ("small", "bf16")}
    assert client.get("/health/ready").status_code == 200
    assert client.post("/generate?model=small", json=BODY).json()["generated_text"] == "bbb"


def test_metrics_have_each_family_once_with_the_series_of_all_models(client: TestClient) -> None:
    client.post("/generate?model=small", json=BODY)
    client.post("/generate", json=BODY)
    lines = client.get("/metrics").text.splitlines()
    assert lines.count("# TYPE bitdial_requests_total counter") == 1
    counts = [line for line in lines if line.startswith("bitdial_requests_total{")]
    assert {line.split('model="')[1].split('"')[0] for line in counts} == {"large", "owner/small"}


def test_tokens_and_comparisons_are_of_the_named_model(client: TestClient) -> None:
    assert client.post("/tokenize?model=small", json={"inputs": "ab"}).status_code == 200
    answer = client.post("/compare?model=small", json={**BODY, "precisions": ["fp32"]}).json()
    assert answer["precisions"]["fp32"]["generated_text"] == "bbb"


def test_a_missing_report_is_asked_for_by_the_models_name(client: TestClient) -> None:
    assert client.get("/report").json()["error"].endswith(" or POST /report")
    assert client.get("/report?model=small").json()["error"].endswith(" or POST /report?model=owner/small")


def test_every_route_about_a_model_says_in_the_api_document_that_it_can_be_named(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    about = (
        "/stats",
        "/info",
        "/precisions",
        "/precisions/{name}/load",
        "/precisions/{name}/unload",
        "/report",
    )
    for path in (*about, "/tokenize", "/compare", "/health", "/health/ready", "/generate", "/v1/completions"):
        for method, operation in paths[path].items():
            named = [one["in"] for one in operation["parameters"] if one["name"] == "model"]
            assert named == ["query"], (method, path)
