"""Unloading over HTTP: weights are freed, running generations end with an error, others continue."""

import asyncio
from collections.abc import Callable

from fastapi import FastAPI
from starlette.testclient import TestClient

from tests.conftest import Loads, at_rest, entered, until, wait_until
from tests.routes.test_generate import PROMPT, ask, events, greedy

MakeApp = Callable[..., FastAPI]


def test_unloading_and_again(client: TestClient, loads: Loads) -> None:
    runner = loads.runners["bf16"]
    for _ in range(2):
        reply = client.post("/precisions/bf16/unload")
        assert (reply.status_code, reply.json()["state"]) == (200, "unloaded")
    wait_until(lambda: runner.closed)
    assert ask(client, max_new_tokens=2, precision="bf16")["generated_text"] == greedy(2)
    assert loads.names.count("bf16") == 2


def test_without_its_default_the_server_is_not_ready(client: TestClient) -> None:
    client.post("/precisions/fp32/unload")
    reply = client.get("/health")
    assert reply.status_code == 503
    assert "fp32 is unloaded" in reply.json()["error"]
    assert ask(client, max_new_tokens=2)["generated_text"] == greedy(2)
    assert client.get("/health").status_code == 200


def test_unloading_ends_generations_with_an_error(make_app: MakeApp, loads: Loads) -> None:
    async def main() -> None:
        async with entered(app) as client:
            loads.runners["bf16"].delay = 0.01
            slow = {"inputs": PROMPT, "max_new_tokens": 200}
            header = {"X-Precision": "bf16"}
            stream = asyncio.create_task(client.post("/generate_stream", json=slow, headers=header))
            whole = asyncio.create_task(client.post("/generate", json=slow, headers=header))
            mate = asyncio.create_task(client.post("/generate", json=slow))
            await until(lambda: 2 in loads.runners["bf16"].batches)
            assert (await client.post("/precisions/bf16/unload")).json()["state"] == "unloaded"
            cut = events((await stream).text)
            assert [one.get("error_type") for one in cut] == [None] * (len(cut) - 1) + ["generation"]
            assert "unloaded" in cut[-1]["error"]
            assert (await whole).status_code == 424
            assert (await whole).headers["x-should-retry"] == "true"
            assert (await mate).json()["generated_text"] == greedy(200)
            assert loads.runners["bf16"].closed
            assert (await client.get("/health")).status_code == 200
            await at_rest(app, client)

    app = make_app()
    asyncio.run(main())
