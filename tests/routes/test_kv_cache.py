"""A cache in blocks over HTTP: cached tokens in ``usage``, figures in ``/stats`` and ``/metrics``."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from loaders.base import LoadedModel, ModelSpec, Progress, ignore_progress
from loaders.kv_cache.block_pool import BLOCK_TOKENS
from server.settings.server import Settings
from tests.checkpoints import byte_tokenizer
from tests.conftest import serving, wait_until
from tests.fakes import fake_checkpoint, fake_model
from tests.paged import BLOCK_BYTES, FakePagedRunner

PROMPT = "a text of some length " * 8
TOKENS = len(byte_tokenizer()(PROMPT)["input_ids"])
CACHED = (TOKENS - 1) // BLOCK_TOKENS * BLOCK_TOKENS


def load_paged(precision: str, spec: ModelSpec, progress: Progress = ignore_progress) -> LoadedModel:
    return fake_model(precision, FakePagedRunner(spec.slots, spec.max_tokens, spec.kv_budget))


@pytest.fixture
def make_paged(tmp_path: Path) -> Callable[..., FastAPI]:
    from server.app import create_app

    def make(**values: Any) -> FastAPI:
        settings = Settings(**{"precisions": "fp32,bf16", "device": "cpu", **values})
        return create_app(settings, open_checkpoint=lambda *_: fake_checkpoint(tmp_path), load=load_paged)

    return make


@pytest.fixture
def client(make_paged: Callable[..., FastAPI]) -> Iterator[TestClient]:
    with TestClient(make_paged(kv_cache_memory=16 * BLOCK_BYTES, admin_api_key="admin")) as client:
        wait_until(lambda: client.get("/health").status_code == 200)
        wait_until(lambda: client.get("/stats").json()["precisions"]["bf16"]["state"] == "loaded")
        yield client


def generate(client: TestClient, key: str | None = None, **values: Any) -> Any:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 4, **values}}
    reply = client.post("/generate", json=body, headers=headers)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_a_repeated_prompt_reports_cached_tokens_and_has_the_same_text(client: TestClient) -> None:
    first, second = generate(client), generate(client)
    assert (first["usage"]["cached_tokens"], second["usage"]["cached_tokens"]) == (0, CACHED)
    assert first["generated_text"] == second["generated_text"]


def test_keys_share_nothing(client: TestClient) -> None:
    cached = [generate(client, key)["usage"]["cached_tokens"] for key in ("one", "two", None, "one")]
    assert cached == [0, 0, 0, CACHED]


def test_prompt_log_probabilities_are_computed_in_full(client: TestClient) -> None:
    generate(client)
    answer = generate(client, decoder_input_details=True)
    assert answer["usage"]["cached_tokens"] == 0
    assert len(answer["details"]["prefill"]) == TOKENS


def test_stats_and_metrics_count_blocks_and_hits(client: TestClient) -> None:
    generate(client)
    generate(client)
    answer = client.get("/stats").json()
    assert answer["kv_cache"]["limit_bytes"] == 16 * BLOCK_BYTES
    assert answer["kv_cache"]["used_bytes"] == CACHED // BLOCK_TOKENS * BLOCK_BYTES
    blocks = answer["precisions"]["fp32"]["kv_cache"]
    assert (blocks["used_blocks"], blocks["cached_blocks"]) == (0, CACHED // BLOCK_TOKENS)
    assert (blocks["queried_tokens"], blocks["hit_tokens"]) == (2 * TOKENS, CACHED)
    assert (blocks["blocks"], blocks["block_bytes"], blocks["preemptions"]) == (16, BLOCK_BYTES, 0)
    assert answer["precisions"]["bf16"]["kv_cache"]["queried_tokens"] == 0
    assert answer["precisions"]["nf4"]["kv_cache"] is None
    for _ in range(2):  # a second scrape counts nothing twice
        text = client.get("/metrics").text
    assert f'bitdial_prefix_cache_hits_total{{model="fake",precision="fp32"}} {CACHED:.1f}' in text
    assert f'bitdial_prefix_cache_queries_total{{model="fake",precision="fp32"}} {2 * TOKENS:.1f}' in text
    assert 'bitdial_preemptions_total{model="fake",precision="fp32"} 0.0' in text
    assert 'bitdial_kv_cache_usage{model="fake",precision="fp32"} 0.0' in text


def test_counters_go_on_after_a_precision_was_loaded_again(client: TestClient) -> None:
    admin = {"Authorization": "Bearer admin"}
    for _ in range(2):
        client.post("/generate", json={"inputs": PROMPT, "precision": "bf16"})
        client.get("/metrics")
        assert client.post("/precisions/bf16/unload", headers=admin).status_code == 200
    text = client.get("/metrics").text
    assert f'bitdial_prefix_cache_queries_total{{model="fake",precision="bf16"}} {2 * TOKENS:.1f}' in text


def test_the_openai_client_reads_cached_tokens(make_paged: Callable[..., FastAPI]) -> None:
    with serving(make_paged()) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        found = []
        for _ in range(2):
            answer = client.completions.create(model="fake", prompt=PROMPT, max_tokens=4)
            assert answer.usage is not None
            assert answer.usage.prompt_tokens_details is not None
            found.append(answer.usage.prompt_tokens_details.cached_tokens)
        assert found == [0, CACHED]
        several = client.completions.create(model="fake", prompt=[PROMPT, PROMPT + "!"], max_tokens=4, n=2)
        assert several.usage is not None
        assert several.usage.prompt_tokens_details is not None
        assert several.usage.prompt_tokens_details.cached_tokens == 2 * CACHED
        *_, last = client.completions.create(
            model="fake", prompt=PROMPT, max_tokens=4, stream=True, stream_options={"include_usage": True}
        )
        assert last.usage is not None
        assert last.usage.prompt_tokens_details is not None
        assert last.usage.prompt_tokens_details.cached_tokens == CACHED


def test_more_streams_than_the_cache_holds_all_end(client: TestClient) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def ask(number: int) -> Any:
        body = {
            "inputs": f"{number} {PROMPT}"[:60],
            "parameters": {"max_new_tokens": 120, "ignore_eos": True},
        }
        return client.post("/generate", json={**body, "precision": ("fp32", "bf16")[number % 2]}).json()

    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(ask, range(16)))
    assert [one["usage"]["generated_tokens"] for one in answers] == [120] * 16
    assert client.get("/stats").json()["kv_cache"]["committed_bytes"] <= 16 * BLOCK_BYTES
