"""A fault in the model fails its own request only, with an error in the format of its API."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
import pytest
import torch
from fastapi import FastAPI

from tests.checkpoints import byte_tokenizer
from tests.conftest import PATIENCE, Loads, at_rest, entered, until, wait_until
from tests.fakes import FakeRunner
from tests.forked import running
from tests.http.test_overload import Gate
from tests.routes.test_generate import PROMPT, events, greedy

MakeApp = Callable[..., FastAPI]
BAD = "@"  # the prompt that causes the fault


def out_of_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB at /secret/path")


def in_prefill(runner: FakeRunner, bad: int) -> None:
    def fail(slot: int, ids: Sequence[int]) -> None:
        if ids[0] == bad:
            raise out_of_memory()

    runner.on_prefill = fail


def in_decode(runner: FakeRunner, bad: int) -> None:
    def fail(slots: Sequence[int]) -> None:
        if any(runner.held[slot][0] == bad for slot in slots):
            raise out_of_memory()

    runner.on_decode = fail


def no_numbers(runner: FakeRunner, bad: int) -> None:
    def poison(logits: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        for row, slot in enumerate(slots):
            if runner.held[slot][0] == bad:
                logits[row] = float("nan")
        return logits

    runner.poison = poison


FAULTS = {"out of memory in prefill": in_prefill, "out of memory in decode": in_decode, "NaN": no_numbers}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_fails_its_request_only(make_app: MakeApp, loads: Loads, fault: str) -> None:
    async def main() -> None:
        async with entered(app) as client:
            FAULTS[fault](loads.runners["fp32"], app.state.default.codec.encode(BAD)[0])
            good = {"inputs": PROMPT, "max_new_tokens": 20}
            paths = ["/generate", "/v1/completions", "/generate_stream"]
            calls = [client.post("/generate", json=good) for _ in range(4)]
            calls += [client.post(path, json={"prompt": BAD}) for path in paths]
            *others, native, openai, stream = await asyncio.gather(*calls)
            assert [reply.json()["generated_text"] for reply in others] == [greedy(20)] * 4
            check_told(native, openai, stream)
            if "memory" in fault:
                assert all("out of memory" in reply.text for reply in (native, openai, stream))
            await at_rest(app, client)

    app = make_app()
    asyncio.run(main())


def check_told(native: httpx.Response, openai: httpx.Response, stream: httpx.Response) -> None:
    assert (native.status_code, native.json()["error_type"]) == (424, "generation")
    assert (openai.status_code, openai.headers["x-should-retry"]) == (500, "false")
    assert openai.json()["error"]["type"] == "api_error"
    answer = events(stream.text)
    assert [one.get("error_type") for one in answer] == [None] * (len(answer) - 1) + ["generation"]
    for reply in (native, openai, stream):
        assert "secret" not in reply.text
        assert "Traceback" not in reply.text


def test_a_dead_worker(make_app: MakeApp, loads: Loads) -> None:
    async def main() -> None:
        async with entered(app) as client:
            die = threading.Event()

            def step(slots: Sequence[int]) -> None:
                if die.is_set():
                    raise SystemExit

            runner = loads.runners["fp32"]
            runner.delay, runner.on_decode = 0.005, step
            native = {"inputs": PROMPT, "max_new_tokens": 200}
            openai = {"prompt": PROMPT, "max_tokens": 200}
            asked = [("/generate", native), ("/v1/completions", openai), ("/generate_stream", native)]
            running = [asyncio.create_task(client.post(path, json=body)) for path, body in asked]
            await until(lambda: 3 in runner.batches)
            die.set()
            check_told(*[await one for one in running])
            refused = await client.post("/generate", json=native)
            assert (refused.status_code, refused.json()["error_type"]) == (503, "unavailable")
            assert "retry-after" in refused.headers
            for path in ("/health", "/health/ready"):
                reply = await client.get(path)
                assert reply.status_code == 503
                assert "worker" in reply.json()["error"]
            assert (await client.get("/health/live")).status_code == 200
            assert app.state.service.places.in_flight == 0

    app = make_app()
    asyncio.run(main())


def test_a_worker_behind_a_hanging_one_is_not_ready(
    make_app: MakeApp, loads: Loads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU engines alternate: while one hangs, none makes progress."""

    async def main() -> None:
        async with entered(app) as client:
            gate = Gate(loads.runners["bf16"])
            hanging = asyncio.create_task(client.post("/generate?precision=bf16", json={"inputs": PROMPT}))
            await until(lambda: gate.prompts)
            assert (await client.get("/health")).status_code == 200
            waiting = asyncio.create_task(client.post("/generate", json={"inputs": PROMPT}))
            await until(lambda: app.state.service.places.in_flight == 2)
            async with asyncio.timeout(PATIENCE):
                while (reply := await client.get("/health")).status_code == 200:
                    await asyncio.sleep(0.02)
            assert reply.status_code == 503
            assert "no progress" in reply.json()["error"]
            gate.opened.set()
            assert (await hanging).status_code == (await waiting).status_code == 200
            assert (await client.get("/health")).status_code == 200
            await at_rest(app, client)

    monkeypatch.setattr("server.engine.engine._SLOWEST_GRACE", 1.0)
    app = make_app()
    asyncio.run(main())


SERVER = """
import os, pathlib, sys, time
from server.app import create_app
from server.http.server import Process
from server.settings.server import Settings
from tests.fakes import fake_checkpoint, fake_load

def load(*arguments):
    model = fake_load(*arguments)
    runner = model.runner
    runner.delay = 0.01
    def step(slots):
        if any(runner.held[slot][0] == runner.next_id([]) for slot in slots):
            {fault}
    runner.on_decode = step
    return model

settings = Settings(port=0, precisions="fp32", device="cpu", hang_timeout=1)
folder = pathlib.Path(sys.argv[1])
app = create_app(settings, open_checkpoint=lambda *_: fake_checkpoint(folder), load=load)
process = Process(app, settings, on_listening=lambda port: print("port", port, flush=True))
os._exit(process.serve_forever())
"""


@pytest.mark.parametrize("fault", ["raise SystemExit", "time.sleep(600)"], ids=["killed", "hung"])
def test_a_process_with_a_dead_worker_fails_its_requests_and_exits_70(tmp_path: Path, fault: str) -> None:
    """A supervisor then restarts the process."""
    first = byte_tokenizer().decode([FakeRunner().next_id([])])
    with running(SERVER.format(fault=fault), str(tmp_path)) as process:
        port = int(process.stdout.readline().split()[1])
        address = f"http://127.0.0.1:{port}"
        wait_until(lambda: httpx.get(f"{address}/health", timeout=PATIENCE).status_code == 200)
        body = {"inputs": PROMPT, "max_new_tokens": 250 - len(PROMPT)}
        with httpx.stream("POST", f"{address}/generate_stream", json=body, timeout=PATIENCE) as stream:
            lines = stream.iter_lines()
            next(lines)
            bad = httpx.post(f"{address}/generate", json={"inputs": first}, timeout=PATIENCE)
            answer = [line for line in lines if line]
        assert (bad.status_code, bad.json()["error_type"]) == (424, "generation")
        assert '"error_type":"generation"' in answer[-1]
        assert process.wait() == 70
