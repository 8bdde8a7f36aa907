"""The shadow: its figures, and that it runs on idle capacity without delaying requests."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI

from server.engine.scheduler import Scheduler
from server.engine.sequence import SamplingParams, Sequence
from server.evaluation import shadow
from tests.conftest import PATIENCE, Loads, at_rest, entered, until
from tests.fakes import FakeRunner
from tests.routes.test_generate import PROMPT

MakeApp = Callable[..., FastAPI]


@pytest.fixture(autouse=True)
def prompt_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow, "_QUIET", 0.02)
    monkeypatch.setattr(shadow, "_POLL", 0.005)


async def ask(client: httpx.AsyncClient, precision: str = "bf16", tokens: int = 6, **more: Any) -> Any:
    body = {"inputs": PROMPT, "max_new_tokens": tokens, "precision": precision, **more}
    reply = await client.post("/generate", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


async def shadow_stats(client: httpx.AsyncClient) -> Any:
    return (await client.get("/stats")).json()["shadow"]


async def compared(client: httpx.AsyncClient, count: int, precision: str = "bf16") -> Any:
    async with asyncio.timeout(PATIENCE):
        while True:
            found = (await shadow_stats(client))["precisions"].get(precision)
            if found and found["requests"]["compared"] >= count:
                return found
            await asyncio.sleep(0.01)


def make(make_app: MakeApp, **values: Any) -> FastAPI:
    return make_app(shadow_precision="fp32", shadow_fraction=1.0, **values)


def test_finished_requests_are_compared_with_the_reference(make_app: MakeApp, loads: Loads) -> None:
    """fp32's top token has logit 8, the others 0; halved logits have the same top token, less probable."""

    def soften(runner: FakeRunner) -> None:
        if loads.names[-1] == "bf16":
            runner.poison = lambda logits, slots: logits / 2

    loads.prepare = soften

    async def work() -> None:
        app = make(make_app)
        async with entered(app) as client:
            await ask(client)
            found = await compared(client, 1)
            p, q = (
                torch.log_softmax(torch.tensor([height] + [0.0] * 319), 0).double() for height in (8.0, 4.0)
            )
            expected = float((p.exp() * (p - q)).sum())
            assert found["mean_kl"] == pytest.approx(expected, rel=1e-5)
            assert found["max_kl"] == pytest.approx(expected, rel=1e-5)
            assert (found["tokens"], found["agreement"]) == (6, 1.0)
            metrics = (await client.get("/metrics")).text
            label = 'model="fake",precision="bf16"'
            assert f'bitdial_shadow_requests_total{{{label},outcome="compared"}} 1.0' in metrics.replace(
                'model="fake",outcome="compared",precision="bf16"', f'{label},outcome="compared"'
            )
            assert f"bitdial_shadow_kl_count{{{label}}} 6.0" in metrics
            assert f"bitdial_shadow_agreement_count{{{label}}} 1.0" in metrics
            await at_rest(app, client)

    asyncio.run(work())


def test_disagreement_is_counted_token_by_token(make_app: MakeApp, loads: Loads) -> None:
    """The reference has another top token after every text of even length."""

    class Other(FakeRunner):
        def next_id(self, ids: Any) -> int:
            return super().next_id(ids) + (len(ids) % 2 == 0)

    def disguise(runner: FakeRunner) -> None:
        if loads.names[-1] == "fp32":
            runner.__class__ = Other

    loads.prepare = disguise

    async def work() -> None:
        async with entered(make(make_app)) as client:
            await ask(client, tokens=8)
            found = await compared(client, 1)
            assert (found["tokens"], found["agreement"]) == (8, 0.5)
            assert found["mean_kl"] > 1

    asyncio.run(work())


def test_the_reference_itself_and_failed_requests_are_not_replayed(make_app: MakeApp) -> None:
    async def work() -> None:
        async with entered(make(make_app)) as client:
            await ask(client, "fp32")
            await client.post("/generate", json={"inputs": "", "precision": "bf16"})
            await ask(client, "bf16")
            await compared(client, 1)
            found = await shadow_stats(client)
            assert (found["reference"], found["waiting"]) == ("fp32", 0)
            assert list(found["precisions"]) == ["bf16"]
            assert found["precisions"]["bf16"]["requests"] == {"compared": 1, "dropped": 0, "failed": 0}

    asyncio.run(work())


def test_only_the_configured_fraction_is_replayed(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = iter([0.1, 0.6, 0.49, 0.5])
    monkeypatch.setattr(random, "random", lambda: next(draws))

    async def work() -> None:
        async with entered(make_app(shadow_precision="fp32", shadow_fraction=0.5)) as client:
            for _ in range(4):
                await ask(client)
            assert (await compared(client, 2))["requests"]["compared"] == 2
            assert (await shadow_stats(client))["waiting"] == 0

    asyncio.run(work())


def test_a_new_request_interrupts_a_replay_which_is_repeated(make_app: MakeApp, loads: Loads) -> None:
    async def work() -> None:
        app = make(make_app, prefill_chunk_busy=1)
        async with entered(app) as client:
            state = app.state.default.shadow
            await ask(client, tokens=40)
            loads.runners["fp32"].delay = 0.05  # a token of the prompt in each step: some two seconds
            await until(lambda: state._activity.replaying)
            engine = app.state.pool.state("fp32").engine
            await until(lambda: engine.running)
            await ask(client, tokens=1)
            assert not state._activity.replaying
            await until(lambda: not engine.running)
            assert len(loads.runners["fp32"].held.get(0, [])) < 40  # its slot is free within a step
            loads.runners["fp32"].delay = 0.0
            found = await compared(client, 2)
            assert found["requests"] == {"compared": 2, "dropped": 0, "failed": 0}
            await at_rest(app, client)

    asyncio.run(work())


def test_nothing_is_replayed_while_requests_run(make_app: MakeApp) -> None:
    async def work() -> None:
        app = make(make_app)
        async with entered(app) as client:
            with app.state.service.places.reserved():
                await ask(client)
                await asyncio.sleep(0.2)
                assert (await shadow_stats(client))["waiting"] == 1
                assert not app.state.default.shadow._activity.replaying
            await compared(client, 1)

    asyncio.run(work())


def test_a_full_queue_drops_the_oldest(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow, "_MOST_WAITING", 2)

    async def work() -> None:
        app = make(make_app)
        async with entered(app) as client:
            with app.state.service.places.reserved():
                for _ in range(5):
                    await ask(client)
            assert (await compared(client, 2))["requests"] == {"compared": 2, "dropped": 3, "failed": 0}

    asyncio.run(work())


def test_nan_logits_fail_a_replay_and_the_shadow_continues(make_app: MakeApp, loads: Loads) -> None:
    async def work() -> None:
        app = make(make_app)
        async with entered(app) as client:
            await ask(client)
            await compared(client, 1)
            loads.runners["fp32"].poison = lambda logits, slots: logits * float("nan")
            await ask(client)
            shadow = app.state.default.shadow
            await until(lambda: shadow.figures()["precisions"]["bf16"]["requests"]["failed"] == 1)
            loads.runners["fp32"].poison = lambda logits, slots: logits
            await ask(client)
            assert (await compared(client, 2))["mean_kl"] == 0.0

    asyncio.run(work())


def test_a_replay_does_not_load_an_unloaded_precision(make_app: MakeApp, loads: Loads) -> None:
    async def work() -> None:
        app = make(make_app)
        async with entered(app) as client:
            with app.state.service.places.reserved():
                await ask(client)
                await client.post("/precisions/bf16/unload")
            await until(lambda: app.state.default.shadow.figures()["precisions"].get("bf16"))
            assert (await shadow_stats(client))["precisions"]["bf16"]["requests"]["dropped"] == 1
            assert loads.names.count("bf16") == 1

    asyncio.run(work())


def test_the_reference_is_loaded_at_the_start(make_app: MakeApp, loads: Loads) -> None:
    async def work() -> None:
        app = make_app(shadow_precision="fp32", precision="bf16", precisions="bf16")
        async with entered(app):
            await until(lambda: "fp32" in loads.names)

    asyncio.run(work())


def test_a_replayed_prompt_is_prefilled_in_small_chunks() -> None:
    scheduler = Scheduler(slots=2, prefill_chunk=64)
    replayed = Sequence(list(range(40)), SamplingParams(max_new_tokens=0), chunk=4)
    other = Sequence(list(range(40)), SamplingParams(max_new_tokens=1))
    scheduler.add(replayed)
    scheduler.add(other)
    chunks = scheduler.schedule(0.0).chunks
    assert [(one.sequence, one.length) for one in chunks] == [(replayed, 4), (other, 40)]
