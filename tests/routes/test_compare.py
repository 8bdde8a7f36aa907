"""``POST /compare``: requests, responses and errors."""

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from torch import Tensor

import loaders
from loaders.base import Availability
from loaders.errors import OutOfMemory
from tests.checkpoints import VOCABULARY, byte_tokenizer
from tests.conftest import Loads, at_rest, entered, until, wait_until
from tests.fakes import FakeRunner
from tests.routes.test_generate import PROMPT, ask, greedy

MakeClient = Callable[..., TestClient]
ROW = {
    "generated_text", "generated_tokens", "finish_reason", "memory", "ttft_ms", "tokens_per_second",
    "prompt_perplexity", "mean_kl", "max_kl", "top1_agreement", "first_divergence",
}  # fmt: skip


def compare(client: TestClient, **body: Any) -> Any:
    reply = client.post("/compare", json={"inputs": PROMPT, "max_new_tokens": 8, **body})
    assert reply.status_code == 200, reply.text
    return reply.json()


def flatter(logits: Tensor, slots: Sequence[int]) -> Tensor:
    """The same top token with half the logit."""
    return logits / 2


class Forgetful(FakeRunner):
    """Another letter after the fifth generated token."""

    def next_id(self, ids: Sequence[int]) -> int:
        return super().next_id(ids) + (len(ids) >= len(byte_tokenizer()(PROMPT)["input_ids"]) + 5)


def test_loaded_precisions_are_compared_by_default(client: TestClient, loads: Loads) -> None:
    wait_until(lambda: [one["state"] for one in client.get("/precisions").json()].count("loaded") == 2)
    loads.runners["bf16"].poison = flatter
    answer = compare(client)
    ids = byte_tokenizer()(PROMPT)["input_ids"]
    assert (answer["reference"], answer["prompt_tokens"]) == ("fp32", len(ids))
    full, other = answer["precisions"]["fp32"], answer["precisions"]["bf16"]
    assert list(answer["precisions"]) == ["fp32", "bf16"]
    assert set(full) == set(other) == ROW
    for row in (full, other):
        assert row["generated_text"] == greedy(8)
        assert (row["generated_tokens"], row["finish_reason"]) == (8, "length")
        assert row["memory"] == {"total_bytes": 4000 + loads.runners["fp32"].kv_cache_bytes}
        assert row["ttft_ms"] > 0
        assert row["tokens_per_second"] > 0
        assert (row["top1_agreement"], row["first_divergence"]) == (1.0, None)
    assert (full["mean_kl"], full["max_kl"]) == (0.0, 0.0)
    # the distributions of logits (8, 0, 0, …) and (4, 0, 0, …), the same at every place
    rest = VOCABULARY - 1
    p, q = math.exp(8) + rest, math.exp(4) + rest
    kl = math.exp(8) / p * (4 - math.log(p / q)) - rest / p * math.log(p / q)
    assert other["mean_kl"] == pytest.approx(kl)
    assert other["max_kl"] == pytest.approx(kl)
    assert full["prompt_perplexity"] == pytest.approx(p, rel=0.5)  # what follows is never the letter


def test_texts_part_where_they_do(client: TestClient, loads: Loads) -> None:
    loads.runners["bf16"].__class__ = Forgetful
    answer = compare(client, precisions=["bf16", "fp32", "bf16"])
    assert answer["precisions"]["bf16"]["first_divergence"] == 5
    assert answer["precisions"]["fp32"]["first_divergence"] is None
    assert list(answer["precisions"]) == ["fp32", "bf16"]
    other = compare(client, precisions=["fp32"], reference="bf16")
    assert list(other["precisions"]) == ["bf16", "fp32"]
    assert other["reference"] == "bf16"
    assert other["precisions"]["fp32"]["first_divergence"] == 5


def test_all_and_by_alias(client: TestClient, loads: Loads) -> None:
    assert list(compare(client, precisions="all")["precisions"]) == list(loaders.direct("cpu"))
    assert list(compare(client, precisions=["4bit", "nf4", "8-bit"])["precisions"]) == ["fp32", "nf4", "int8"]


def test_sampling_is_that_of_generate_by_the_same_seed(client: TestClient) -> None:
    wishes = {"temperature": 3.0, "seed": 7, "stop": ["zz"]}
    answer = compare(client, precisions=["fp32", "bf16"], parameters=wishes)
    assert answer["seed"] == 7
    expected = ask(client, max_new_tokens=8, **wishes)["generated_text"]
    assert [row["generated_text"] for row in answer["precisions"].values()] == [expected] * 2
    assert expected != greedy(8)


def test_markdown_has_the_table_and_the_texts(client: TestClient, loads: Loads) -> None:
    loads.runners["bf16"].__class__ = Forgetful
    body = {"inputs": PROMPT, "max_new_tokens": 8}
    reply = client.post("/compare", json=body, headers={"Accept": "text/markdown"})
    assert reply.headers["content-type"] == "text/markdown; charset=utf-8"
    lines = reply.text.splitlines()
    widths = {line.count("|") for line in lines[:4]}
    assert len(widths) == 1
    assert lines[3].startswith("| bf16 |")
    assert lines[3].endswith("| 5 |")
    assert f"**fp32**\n\n```text\n{greedy(8)}\n```" in reply.text


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"inputs": ""}, "inputs"),
        ({}, "inputs"),
        ({"inputs": "a", "prompt": "a"}, "either"),
        ({"inputs": 5}, "inputs"),
        ({"inputs": "a", "precisions": []}, "precisions"),
        ({"inputs": "a", "precisions": "fp32"}, 'list of names, or "all"'),
        ({"inputs": "a", "precisions": [8]}, "list of names"),
        ({"inputs": "a", "precisions": ["fp32"] * 65}, "from 1 to 64"),
        ({"inputs": "a", "precisions": ["int3"]}, "unknown precision 'int3'; choose from fp32"),
        ({"inputs": "a", "precisions": ["auto"]}, "auto"),
        ({"inputs": "a", "reference": "int3"}, "unknown precision 'int3'"),
        ({"inputs": "a", "reference": None}, "reference"),
        ({"inputs": "a", "precision": "fp32"}, "unknown field 'precision'"),
        ({"inputs": "a", "best_of": 2}, "unknown field 'best_of'"),
        ({"inputs": "a", "parameters": {"details": True}}, "unknown field 'details'"),
        ({"inputs": "a", "parameters": {"temperature": -1}}, "temperature"),
        ({"inputs": "a" * 300}, "300 tokens"),
        ({"inputs": "a", "max_new_tokens": 256}, "maximum context length is 256 tokens"),
    ],
)
def test_bad_requests(client: TestClient, body: Any, expected: str) -> None:
    reply = client.post("/compare", json=body)
    assert (reply.status_code, reply.json()["error_type"]) == (422, "validation"), reply.text
    assert expected in reply.json()["error"]
    compare(client)


def test_a_precision_that_this_host_cannot_run(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    able = loaders.availability

    def availability(name: str, device: Any) -> Availability:
        return Availability("no such kernels") if name == "int8" else able(name, device)

    monkeypatch.setattr(loaders, "availability", availability)
    client = make_client()
    reply = client.post("/compare", json={"inputs": "a", "precisions": ["int8"]})
    assert (reply.status_code, reply.json()["error_type"]) == (409, "unavailable")
    assert "int8" not in compare(client, precisions="all")["precisions"]


class Failing(Loads):
    """nf4 never loads."""

    def __call__(self, precision: str, *others: Any) -> Any:
        if precision == "nf4":
            raise OutOfMemory("no room on the device")
        return super().__call__(precision, *others)


def test_one_of_all_that_fails_has_its_error_and_one_that_was_named_fails_all(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from server.app import create_app
    from server.settings.server import Settings
    from tests.fakes import fake_checkpoint

    app = create_app(
        Settings(precisions="fp32", device="cpu"),
        open_checkpoint=lambda *_: fake_checkpoint(tmp_path),
        load=Failing(),
    )
    with TestClient(app) as client:
        rows = compare(client, precisions="all")["precisions"]
        assert set(rows["nf4"]) == {"error", "error_type"}
        assert rows["nf4"]["error_type"] == "unavailable"
        assert "no room on the device" in rows["nf4"]["error"]
        assert all(set(row) == ROW for name, row in rows.items() if name != "nf4")
        body = {"inputs": "a", "precisions": "all", "max_new_tokens": 4}
        table = client.post("/compare", json=body, headers={"Accept": "text/markdown"}).text
        assert "| nf4 | nf4 could not be loaded: no room on the device |" in table
        reply = client.post("/compare", json={"inputs": "a", "precisions": ["nf4"]})
        assert (reply.status_code, "retry-after" in reply.headers) == (503, True)


def test_a_comparison_needs_the_key(make_client: MakeClient) -> None:
    client = make_client(api_key="secret")
    assert client.post("/compare", json={"inputs": "a"}).status_code == 401
    bearer = {"Authorization": "Bearer secret"}
    assert client.post("/compare", json={"inputs": "a"}, headers=bearer).status_code == 200


def test_a_comparison_holds_one_place_and_releases_it(make_app: Callable[..., FastAPI], loads: Loads) -> None:
    async def main() -> None:
        async with entered(app) as client:
            runner = loads.runners["fp32"]
            runner.delay = 0.005
            body = {"inputs": PROMPT, "max_new_tokens": 40}
            first = asyncio.create_task(client.post("/compare", json=body))
            await until(lambda: len(runner.batches) > 3)
            assert app.state.service.places.in_flight == 1
            refused = await client.post("/compare", json=body)
            assert (refused.status_code, "retry-after" in refused.headers) == (429, True)
            assert (await first).status_code == 200
            await at_rest(app, client)

    app = make_app(max_concurrent_requests=1)
    asyncio.run(main())


def test_one_after_another(make_app: Callable[..., FastAPI], loads: Loads) -> None:
    """The kept logits of a reference are large: two comparisons never keep them at once."""

    async def main() -> None:
        async with entered(app) as client:
            body = {"inputs": PROMPT, "max_new_tokens": 6}
            replies = await asyncio.gather(*(client.post("/compare", json=body) for _ in range(4)))
            assert {reply.status_code for reply in replies} == {200}
            assert max(loads.runners["fp32"].batches) == 1
            await at_rest(app, client)

    app = make_app()
    asyncio.run(main())


def test_time_that_is_up(make_app: Callable[..., FastAPI], loads: Loads) -> None:
    async def main() -> None:
        async with entered(app) as client:
            loads.runners["fp32"].delay = 0.02
            reply = await client.post("/compare", json={"inputs": PROMPT, "max_new_tokens": 100})
            assert (reply.status_code, reply.json()["error_type"]) == (504, "timeout")
            loads.runners["fp32"].delay = 0.0
            await at_rest(app, client)

    app = make_app(request_timeout=0.3)
    asyncio.run(main())


def test_a_client_that_leaves_frees_the_slot_and_the_place(
    make_app: Callable[..., FastAPI], loads: Loads
) -> None:
    async def main() -> None:
        async with entered(app) as client:
            runner = loads.runners["fp32"]
            runner.delay = 0.01
            leaving = asyncio.create_task(
                client.post("/compare", json={"inputs": PROMPT, "max_new_tokens": 200})
            )
            await until(lambda: len(runner.batches) > 3)
            leaving.cancel()
            with pytest.raises((asyncio.CancelledError, httpx.TransportError)):
                await leaving
            await at_rest(app, client)
            assert len(runner.batches) < 100

    app = make_app()
    asyncio.run(main())
