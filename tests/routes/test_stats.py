"""``/stats``, ``/info``: their documented format, and figures that match the requests."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.testclient import TestClient

import loaders
from server.engine.sequence import StepStats
from server.version import VERSION
from tests.conftest import Loads
from tests.fakes import FakeDeviceRunner
from tests.routes.test_generate import ask

PERCENTILES = {"p50", "p90", "p99", "mean"}
SHAPE: dict[str, Any] = {
    "model": {"id", "revision", "architecture", "parameters", "context_length"},
    "models": None,
    "host": {"device", "device_name", "cpu_threads", "memory"},
    "uptime_seconds": None,
    "queue": {"running", "waiting", "in_flight", "capacity"},
    "memory": {"limit_bytes", "used_bytes", "free_bytes"},
    "kv_cache": {"limit_bytes", "used_bytes", "committed_bytes"},
    "report": {"finished", "note", "recommendation", "precisions"},
    "shadow": None,
    "precisions": set(loaders.PRECISIONS),
}
MEMORY = {"process_rss_bytes", "total_bytes", "available_bytes", "gpu_allocated_bytes", "gpu_reserved_bytes",
          "gpu_peak_bytes", "gpu_total_bytes"}  # fmt: skip
PRECISION = {"state", "reason", "memory", "layers", "kv_cache", "load_seconds", "latency", "throughput",
             "speed_ratio_to_fp32", "speed_ratio_range", "note", "warning"}  # fmt: skip
BYTES = {"weights_bytes", "by_dtype", "quantization_state_bytes", "kv_cache_bytes", "working_bytes",
         "total_bytes", "transformers_footprint_bytes", "bits_per_weight", "ratio_to_fp32"}  # fmt: skip


def stats(client: TestClient, **query: str) -> Any:
    reply = client.get("/stats", params=query)
    assert reply.status_code == 200
    return reply.json()


def test_the_shape(client: TestClient) -> None:
    answer = stats(client)
    assert set(answer) == set(SHAPE)
    for key in ("model", "host", "queue", "kv_cache", "report", "precisions"):
        assert set(answer[key]) == SHAPE[key]
    assert set(answer["host"]["memory"]) == MEMORY
    for name, one in answer["precisions"].items():
        assert set(one) >= PRECISION, name
        assert set(one["latency"]) == {"requests", "queue_ms", "ttft_ms", "inter_token_ms", "total_ms"}
        assert all(set(v) == PERCENTILES for k, v in one["latency"].items() if k != "requests")
        assert set(one["throughput"]) == {"generated_tokens", "tokens_per_second"}
        if one["state"] == "loaded":
            assert set(one["memory"]) >= BYTES
            assert set(one["layers"]) >= {"quantized", "kept"}
        else:
            assert one["memory"] is one["layers"] is one["load_seconds"] is None


def test_one_start_time(make_client: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(time=lambda: 1e9, monotonic=lambda: 50.0)
    monkeypatch.setattr("server.state.time", clock)
    client = make_client()
    clock.time, clock.monotonic = lambda: 2e9, lambda: 57.5  # the wall clock was set meanwhile
    assert stats(client)["uptime_seconds"] == 7.5
    assert {one["created"] for one in client.get("/v1/models").json()["data"]} == {10**9}


def test_the_figures_are_those_of_the_model(client: TestClient, loads: Loads) -> None:
    answer = stats(client)
    assert answer["model"] == {
        "id": "fake",
        "revision": None,
        "architecture": "GPT2LMHeadModel",
        "parameters": 1000,
        "context_length": 256,
    }
    memory, cache = answer["precisions"]["fp32"]["memory"], loads.runners["fp32"].kv_cache_bytes
    assert (memory["weights_bytes"], memory["by_dtype"]) == (4000, {"float32": 4000})
    assert (memory["kv_cache_bytes"], memory["total_bytes"]) == (cache, 4000 + cache)
    assert (memory["bits_per_weight"], memory["ratio_to_fp32"]) == (32.0, 1.0)
    assert answer["host"]["device"] == "cpu"
    assert answer["host"]["memory"]["process_rss_bytes"] > 0


def test_an_accelerators_memory_and_details_are_reported(client: TestClient) -> None:
    state = client.app.state.pool.state("fp32")  # type: ignore[attr-defined]
    runner = state.engine.model.runner = FakeDeviceRunner()
    runner.report = lambda: {"captured": False, "not_captured_because": "wanted so"}  # type: ignore[attr-defined]
    answer = stats(client)["precisions"]["fp32"]
    assert answer["memory"]["working_bytes"] == runner.working_bytes == 64
    assert answer["memory"]["total_bytes"] == 4000 + runner.kv_cache_bytes + 64
    assert answer["details"] == {"captured": False, "not_captured_because": "wanted so"}


def test_the_counts_are_those_of_the_requests(client: TestClient) -> None:
    assert stats(client)["precisions"]["fp32"]["latency"]["ttft_ms"]["p50"] is None
    for count in (2, 5, 9):
        ask(client, max_new_tokens=count)
    ask(client, max_new_tokens=4, precision="bf16")
    client.post("/generate", json={"inputs": "", "max_new_tokens": 4})
    answer = stats(client)
    fp32, bf16 = (answer["precisions"][name] for name in ("fp32", "bf16"))
    assert (fp32["latency"]["requests"], bf16["latency"]["requests"]) == (3, 1)
    assert (fp32["throughput"]["generated_tokens"], bf16["throughput"]["generated_tokens"]) == (16, 4)
    assert fp32["throughput"]["tokens_per_second"] > 0
    for name in ("queue_ms", "ttft_ms", "inter_token_ms", "total_ms"):
        figures = fp32["latency"][name]
        assert 0 <= figures["p50"] <= figures["p90"] <= figures["p99"]
    assert answer["queue"] == {"running": 0, "waiting": 0, "in_flight": 0, "capacity": 128}


def test_narrowed_to_one_precision(client: TestClient) -> None:
    assert list(stats(client, precision="bf16")["precisions"]) == ["bf16"]
    assert list(stats(client, precision="8bit")["precisions"]) == ["int8"]


@pytest.mark.parametrize("name", ["int3", "FP32 ", "", "../x"])
def test_an_unknown_precision_is_refused_with_the_choices(client: TestClient, name: str) -> None:
    reply = client.get("/stats", params={"precision": name})
    assert (reply.status_code, reply.json()["error_type"]) == (422, "validation")
    assert "choose from fp32" in reply.json()["error"]


@pytest.mark.parametrize(
    ("fp32", "bf16", "ratio", "slower"), [(0.01, 0.04, 0.25, True), (0.04, 0.01, 4.0, False)]
)
def test_a_note_is_shown_if_the_smaller_precision_is_slower(
    client: TestClient, fp32: float, bf16: float, ratio: float, slower: bool
) -> None:
    app: Any = client.app
    metrics = app.state.default.metrics
    for seconds, name in ((fp32, "fp32"), (bf16, "bf16")):
        for _ in range(10):
            metrics.observe_step(name, StepStats(1, 0, 1, seconds, (seconds,)))
        for _ in range(50):  # steps of other batch sizes don't count for one row's speed
            metrics.observe_step(name, StepStats(4, 0, 4, 9.0, (9.0,) * 4))
    answer = stats(client)["precisions"]
    assert answer["bf16"]["speed_ratio_to_fp32"] == ratio
    assert answer["fp32"]["speed_ratio_to_fp32"] == 1.0
    assert answer["fp32"]["note"] is None
    if slower:
        assert "slower than fp32" in answer["bf16"]["note"]
        assert str(ratio) in answer["bf16"]["note"]
    else:
        assert answer["bf16"]["note"] is None
    assert answer["int8"]["speed_ratio_to_fp32"] is answer["int8"]["note"] is None


@pytest.mark.parametrize(
    ("fp32", "bf16", "ratio", "least", "most", "noted"),
    [
        ((0.01, 0.02), (0.01, 0.04), 0.6, 0.25, 2.0, False),  # either may be slower
        ((0.010, 0.011), (0.011, 0.012), 0.913, 0.833, 1.0, False),
        ((0.010, 0.011), (0.012, 0.013), 0.84, 0.769, 0.917, True),
    ],
)
def test_there_is_no_note_while_step_times_overlap(
    client: TestClient, fp32: tuple[float, float], bf16: tuple[float, float], ratio: float, least: float,
    most: float, noted: bool,
) -> None:  # fmt: skip
    app: Any = client.app
    for name, several in (("fp32", fp32), ("bf16", bf16)):
        for seconds in several * 50:
            app.state.default.metrics.observe_step(name, StepStats(1, 0, 1, seconds, (seconds,)))
    found = stats(client)["precisions"]
    assert found["bf16"]["speed_ratio_to_fp32"] == ratio
    assert found["bf16"]["speed_ratio_range"] == [least, most]
    assert found["bf16"]["note"] == (
        f"bf16 is slower than fp32 on this host: {ratio} × its speed" if noted else None
    )
    assert found["fp32"]["speed_ratio_range"] == [1.0, 1.0]
    assert found["int8"]["speed_ratio_range"] is None


def test_slower_in_real_steps(make_client: Callable[..., TestClient], loads: Loads) -> None:
    client = make_client()
    loads.runners["bf16"].delay = 0.03
    for precision in ("fp32", "bf16"):
        ask(client, max_new_tokens=12, precision=precision)
    assert "slower than fp32" in stats(client)["precisions"]["bf16"]["note"]


def test_figures_of_an_unloaded_precision_remain(client: TestClient) -> None:
    ask(client, max_new_tokens=4, precision="bf16")
    assert client.post("/precisions/bf16/unload").json()["state"] == "unloaded"
    answer = stats(client)["precisions"]["bf16"]
    assert answer["memory"] is None
    assert answer["latency"]["requests"] == 1


def test_info(make_client: Callable[..., TestClient]) -> None:
    client = make_client(
        max_total_tokens=100, max_input_tokens=50, max_best_of=3, max_stop_sequences=2, precision="bf16"
    )
    answer = client.get("/info").json()
    able = [name for name in loaders.PRECISIONS if loaders.availability(name, "cpu").ok]
    expected = {
        "model_id": "fake",
        "model_sha": None,
        "model_pipeline_tag": "text-generation",
        "max_input_tokens": 50,
        "max_total_tokens": 100,
        "max_best_of": 3,
        "max_stop_sequences": 2,
        "max_concurrent_requests": 128,
        "max_client_batch_size": 1,
        "version": VERSION,
        "precision": "bf16",
        "precisions": able,
    }
    assert {key: answer[key] for key in expected} == expected
