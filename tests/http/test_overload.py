"""Overload: excess requests are refused early, and admitted ones are not affected."""

import asyncio
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import psutil
import pytest
from fastapi import FastAPI

from tests.conftest import Loads, at_rest, entered, serving, until, wait_until
from tests.fakes import FakeRunner
from tests.http.test_http_robustness import send
from tests.routes.test_generate import PROMPT, events, greedy

MakeApp = Callable[..., FastAPI]
KEY = {"authorization": "Bearer secret"}


class Gate:
    """Holds every decode step of a runner until it is opened."""

    def __init__(self, runner: FakeRunner) -> None:
        self.opened = threading.Event()
        self.prompts: list[list[int]] = []
        runner.on_decode = lambda slots: self._wait()
        runner.on_prefill = lambda slot, ids: self.prompts.append(list(ids))

    def _wait(self) -> None:
        assert self.opened.wait(10)


def test_a_full_queue_refuses_before_reading_the_body(make_app: MakeApp, loads: Loads) -> None:
    async def main() -> None:
        async with entered(app) as client:
            client.headers.update(KEY)
            gate, asked = Gate(loads.runners["fp32"]), {"inputs": PROMPT, "max_new_tokens": 5}
            held = asyncio.create_task(client.post("/generate", json=asked))
            await until(lambda: app.state.service.places.in_flight == 1)
            for path in ("/generate", "/", "/models/anybody/anything", "/v1/chat/completions"):
                assert (await client.post(path, content=b"{ no JSON")).status_code == 429
            assert (
                await client.post("/generate", content=b"{ no JSON", headers={"authorization": ""})
            ).status_code == 401
            assert (await client.post("/generate", content=b" " * 2000)).status_code == 413
            assert (await client.post("/tokenize", content=b"{ no JSON")).status_code == 429
            assert (await client.get("/precisions")).status_code == 200
            counted = (await client.get("/metrics")).text
            assert 'outcome="overloaded",precision="unread"} 4.0' in counted
            gate.opened.set()
            assert (await held).status_code == 200
            assert (await client.post("/generate", content=b"{ no JSON")).status_code == 400
            await at_rest(app, client)

    app = make_app(max_concurrent_requests=1, api_key="secret", payload_limit=1000)
    asyncio.run(main())


def text_of(reply: httpx.Response) -> Any:
    if reply.headers["content-type"].startswith("text/event-stream"):
        return events(reply.text)[-1]["generated_text"]
    return reply.json()["generated_text"]


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/", "/v1/completions"])
def test_a_request_beyond_the_places_is_refused_before_any_computation(
    make_app: MakeApp, loads: Loads, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    async def main() -> None:
        async with entered(app) as client:
            gate = Gate(loads.runners["fp32"])
            body = {"inputs": PROMPT, "max_new_tokens": 5}
            held = [asyncio.create_task(client.post("/generate", json=body)) for _ in range(3)]
            await until(lambda: app.state.service.places.in_flight == 3)
            with monkeypatch.context() as patch:
                patch.setattr(app.state.default.codec, "encode", pytest.fail)
                over = await client.post(path, json={"prompt": PROMPT})
            assert over.status_code == 429
            assert int(over.headers["retry-after"]) >= 1
            answer = over.json()
            if path.startswith("/v1"):
                assert answer["error"]["type"] == "rate_limit_error"
            else:
                assert answer["error_type"] == "overloaded"
            assert (await client.get("/health")).status_code == 200
            gate.opened.set()
            assert [text_of(await one) for one in held] == [greedy(5)] * 3
            await at_rest(app, client)

    app = make_app(max_concurrent_requests=3)
    asyncio.run(main())


def test_a_thousand_concurrent_requests_get_their_own_texts(make_app: MakeApp) -> None:
    async def main() -> None:
        async with entered(app) as client:

            async def ask(number: int) -> None:
                prompt = f"[{number * 7919:07d}] "
                path = ("/generate", "/generate_stream")[number % 2]
                precision = ("fp32", "bf16")[number // 2 % 2]
                count = 1 + number % 5
                body = {"inputs": prompt, "max_new_tokens": count, "return_full_text": True}
                reply = await client.post(path, json=body, headers={"X-Precision": precision})
                assert reply.headers["x-precision"] == precision
                assert text_of(reply) == prompt + greedy(count, prompt)

            async with asyncio.TaskGroup() as group:
                for number in range(1000):
                    group.create_task(ask(number))
            await at_rest(app, client)
            answer = (await client.get("/stats")).json()
            assert answer["queue"]["in_flight"] == 0

    app = make_app(max_concurrent_requests=1000)
    asyncio.run(main())


def test_clients_that_retry_are_all_served(make_app: MakeApp) -> None:
    async def main() -> None:
        refused = 0
        async with entered(app) as client:

            async def ask(number: int) -> None:
                nonlocal refused
                prompt = f"<{number}>"
                body = {"inputs": prompt, "max_new_tokens": 4}
                while (reply := await client.post("/generate", json=body)).status_code == 429:
                    refused += 1
                    await asyncio.sleep(0.02)
                assert text_of(reply) == greedy(4, prompt)

            await asyncio.gather(*(ask(number) for number in range(60)))
            await at_rest(app, client)
            assert refused

    app = make_app(max_concurrent_requests=6, max_batch_size=2)
    asyncio.run(main())


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_a_deadline_in_the_queue_is_a_504_without_computation(
    make_app: MakeApp, loads: Loads, path: str
) -> None:
    async def main() -> None:
        async with entered(app) as client:
            gate = Gate(loads.runners["fp32"])
            stream = {"inputs": "first", "max_new_tokens": 50}
            running = asyncio.create_task(client.post("/generate_stream", json=stream))
            await until(lambda: gate.prompts)
            waiting = asyncio.create_task(client.post(path, json={"prompt": "second"}))
            await asyncio.sleep(0.5)
            assert app.state.pool.state("fp32").engine.waiting == 1
            gate.opened.set()
            late = await waiting
            assert late.status_code == 504
            answer = late.json()
            assert answer["error"] if path.startswith("/v1") else answer["error_type"] == "timeout"
            assert gate.prompts == [app.state.default.codec.encode("first")]
            cut = events((await running).text)
            assert [one.get("error_type") for one in cut] == [None] * (len(cut) - 1) + ["timeout"]
            assert 1 < len(cut) < 50
            await at_rest(app, client)

    app = make_app(max_batch_size=1, request_timeout=0.4)
    asyncio.run(main())


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/v1/completions"])
def test_a_request_that_would_be_late_is_not_admitted(make_app: MakeApp, loads: Loads, path: str) -> None:
    """Behind 200 tokens of 10 ms or more, as measured before."""

    async def main() -> None:
        async with entered(app) as client:
            runner, prompts = loads.runners["fp32"], list[list[int]]()
            runner.delay = 0.01
            two = [client.post("/generate", json={"inputs": PROMPT, "max_new_tokens": 9}) for _ in range(2)]
            assert [reply.status_code for reply in await asyncio.gather(*two)] == [200, 200]
            runner.on_prefill = lambda slot, ids: prompts.append(list(ids))
            long = {"inputs": "first", "max_new_tokens": 200}
            running = asyncio.create_task(client.post("/generate_stream", json=long))
            await until(lambda: prompts)
            limit = "max_tokens" if path.startswith("/v1") else "max_new_tokens"
            refused = await client.post(path, json={"prompt": "second", limit: 5})
            assert refused.status_code == 429
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert "within 1.5 s" in refused.text
            assert app.state.pool.state("fp32").engine.waiting == 0
            await running
            assert prompts == [app.state.default.codec.encode("first")]
            await at_rest(app, client)

    app = make_app(max_batch_size=1, request_timeout=1.5)
    asyncio.run(main())


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_a_client_that_leaves_the_queue_is_never_computed(make_app: MakeApp, loads: Loads, path: str) -> None:
    app = make_app(max_batch_size=1)
    with serving(app) as address:
        gate, engine = Gate(loads.runners["fp32"]), app.state.pool.state("fp32").engine
        staying = send(address, "/generate", json.dumps({"inputs": "first", "max_new_tokens": 5}).encode())
        staying.settimeout(10)
        wait_until(lambda: gate.prompts)
        leaving = send(address, path, json.dumps({"inputs": "second"}).encode())
        wait_until(lambda: engine.waiting == 1)
        leaving.close()
        wait_until(lambda: app.state.service.places.in_flight == 1)
        gate.opened.set()
        said = b""
        while greedy(5, "first").encode() not in said:
            said += staying.recv(65536)
        wait_until(lambda: engine.running + engine.waiting == 0)
        assert gate.prompts == [app.state.default.codec.encode("first")]
        staying.close()


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_a_client_that_leaves_in_prefill(make_app: MakeApp, loads: Loads, path: str) -> None:
    app = make_app(prefill_chunk=4)
    with serving(app) as address:
        runner, engine = loads.runners["fp32"], app.state.pool.state("fp32").engine
        runner.delay, prompts = 0.02, []
        runner.on_prefill = lambda slot, ids: prompts.append(len(ids))
        leaving = send(address, path, json.dumps({"inputs": "x" * 240}).encode())
        wait_until(lambda: prompts)
        leaving.close()
        wait_until(lambda: app.state.service.places.in_flight == 0)
        wait_until(lambda: engine.running + engine.waiting == 0 and not runner.held)
        assert sum(prompts) < 240


@pytest.mark.slow
def test_ten_times_overload_leaves_full_steps_and_the_memory(make_app: MakeApp, loads: Loads) -> None:
    """Refusing takes no places from what is served: the engine's steps stay full."""
    body, rows = {"inputs": PROMPT, "max_new_tokens": 20}, list[int]()

    async def main() -> None:
        async with entered(app) as client:

            async def ask() -> int:
                return (await client.post("/generate", json=body)).status_code

            async def arriving(per_second: float, seconds: float) -> tuple[float, float]:
                """Requests served per second, in an open loop, and the mean rows of a step."""
                rows.clear()
                begun, asked = time.monotonic(), list[asyncio.Task[int]]()
                while (now := time.monotonic() - begun) < seconds:
                    asked += [asyncio.create_task(ask()) for _ in range(int(now * per_second) - len(asked))]
                    await asyncio.sleep(0.005)
                statuses = await asyncio.gather(*asked)
                assert set(statuses) == {200, 429}
                return statuses.count(200) / (time.monotonic() - begun), sum(rows) / len(rows)

            loads.runners["fp32"].delay = 0.02
            loads.runners["fp32"].on_decode = lambda slots: rows.append(len(slots))
            peak, usual = await arriving(50, 10)
            before = psutil.Process().memory_info().rss
            assert (await arriving(10 * peak, 60))[1] >= 0.9 * usual
            assert psutil.Process().memory_info().rss - before < 50 * 2**20
            await at_rest(app, client)

    app = make_app(max_concurrent_requests=16, max_batch_size=8)
    asyncio.run(main())
