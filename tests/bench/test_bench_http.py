"""The benchmark's client and loads against a real server on a model without weights."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest
from fastapi import FastAPI

from server.bench.errors import BenchError
from server.bench.http import checks
from server.bench.http.client import Answer, Client, Reply
from server.bench.http.contender import HttpContender
from server.bench.http.load import Limits, Load, Shape, summarize_load
from server.bench.http.texts import Texts
from tests.conftest import Loads, serving
from tests.fakes import FakeRunner

_T = TypeVar("_T")
LOOSE = Limits(ttft_ms=60_000, inter_token_ms=60_000)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def ask(url: str, work: Callable[[Client], Awaitable[_T]]) -> _T:
    async def run() -> _T:
        return await work(Client(url))

    return asyncio.run(run())


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def received(pieces: list[bytes]) -> Reply:
    async def run() -> Reply:
        reply = Reply(b"")
        for piece in pieces:
            reply.data_received(piece)
        reply.connection_lost(None)
        await reply.ended
        return reply

    return asyncio.run(run())


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_a_stream_is_the_same_however_it_is_cut(size: int) -> None:
    body = (
        chunk(b'data: {"index": 1}\n\n')
        + chunk(b'data: {"ind')
        + chunk(b'ex": 2}\n\ndata: 3\n\n')
        + chunk(b"")
    )
    whole = HEAD + body
    reply = received([whole[i : i + size] for i in range(0, len(whole), size)])
    assert (reply.status, len(reply.arrivals), reply.last_event.strip(), reply.whole) == (200, 3, b"3", True)


def test_a_broken_stream_is_incomplete() -> None:
    assert not received([HEAD + chunk(b"data: 1\n\n")]).whole


def test_a_body_without_chunks_ends_with_its_connection() -> None:
    reply = received([b"HTTP/1.1 422 No\r\ncontent-length: 7\r\n\r\n", b'{"a"', b": 1}"])
    assert (reply.status, reply.body, reply.whole) == (422, b'{"a": 1}', True)


def test_a_request_streams_the_requested_number_of_tokens(live: str) -> None:
    answer = ask(live, lambda client: client.stream("abc", 9, "bf16"))
    assert answer.error is None
    assert len(answer.arrivals) == 9
    assert answer.last["precision"] == "bf16"
    assert answer.last["details"]["generated_tokens"] == 9
    assert len(answer.gaps) == 8
    assert 0 < answer.ttft <= answer.arrivals[-1] - answer.sent


def test_a_refusal_an_unreachable_server_and_a_fault_are_errors_of_the_answer(
    make_app: Callable[..., FastAPI], loads: Loads
) -> None:
    with serving(make_app()) as url:
        assert ask(url, lambda client: client.stream("abc", 5, "int3")).error == "status 422"

        def fail(slots: Any) -> None:
            raise RuntimeError

        loads.runners["fp32"].on_decode = fail
        broken = ask(url, lambda client: client.stream("abc", 5, "fp32"))
        assert broken.error == "while streaming: generation"
        assert len(broken.arrivals) == 1
    assert ask(url, lambda client: client.stream("abc", 5, "fp32")).error == "ConnectionRefusedError"


def test_a_wrong_address_is_reported_immediately() -> None:
    for url in ("https://host", "http://", "ftp://host:1"):
        with pytest.raises(BenchError, match="is not an address"):
            Client(url)


@pytest.mark.parametrize("tokens", [1, 32, 128])
def test_texts_have_exactly_the_requested_tokens(live: str, tokens: int) -> None:
    async def work(client: Client) -> None:
        texts = await Texts(client).get(5, tokens, distinct=3)
        assert len(texts) == 5
        assert texts[:2] == texts[3:]
        for text in set(texts):
            answer = await client.stream(text, 2, None)
            assert answer.last["details"]["input_length"] == tokens

    ask(live, work)


def test_the_server_is_measured_like_an_engine(live: str) -> None:
    closed: list[bool] = []

    async def close() -> None:
        closed.append(True)

    async def work(client: Client) -> None:
        contender = HttpContender(client, "fp32", close)
        run = await contender.run([[5] * 20] * 3, 12)
        assert [len(row) for row in run.arrivals] == [12, 12, 12]
        assert run.prefill_seconds > 0
        with pytest.raises(BenchError, match="requests failed: status 422"):
            await contender.run([[5] * 20], 10_000)
        await contender.close()
        assert closed == [True]

    ask(live, work)


def test_a_closed_loop_keeps_its_streams_busy(make_app: Callable[..., FastAPI], loads: Loads) -> None:
    def slow(runner: FakeRunner) -> None:
        runner.delay = 0.002

    loads.prepare = slow
    with serving(make_app()) as url:

        async def work(client: Client) -> None:
            load = Load(client, Texts(client), Shape("fp32", prompt=4, tokens=10), LOOSE)
            figures = await load.closed_loop(streams=3, seconds=0.3)
            assert (figures.kind, figures.offered, figures.errors) == ("closed loop", 3, {})
            assert figures.requests >= 6  # every stream sent a second request
            assert figures.tokens_per_second == pytest.approx(10 * figures.requests_per_second)
            assert figures.goodput == figures.requests_per_second
            assert figures.seconds >= 0.3

        ask(url, work)
        assert max(loads.runners["fp32"].batches) == 3


def test_poisson_arrivals_are_independent_and_refusals_are_counted(
    make_app: Callable[..., FastAPI], loads: Loads
) -> None:
    def slow(runner: FakeRunner) -> None:
        runner.delay = 0.02

    loads.prepare = slow
    with serving(make_app(max_concurrent_requests=2)) as url:

        async def work(client: Client) -> None:
            load = Load(client, Texts(client), Shape("fp32", prompt=4, tokens=20), LOOSE)
            figures = await load.poisson(rate=60, seconds=0.5)
            assert figures.requests > 10
            assert set(figures.errors) == {"status 429"}
            fine = figures.requests - figures.errors["status 429"]
            assert 0 < fine < figures.requests
            assert figures.requests_per_second == pytest.approx(fine / figures.seconds)

        ask(url, work)


def test_goodput_counts_requests_that_met_both_limits() -> None:
    def answer(ttft: float, gap: float, error: str | None = None) -> Answer:
        return Answer(10.0, [10.0 + ttft + gap * i for i in range(5)], error)

    answers = [
        answer(0.1, 0.01),
        answer(0.3, 0.01),  # its first token late
        answer(0.1, 0.05),  # slow after it
        answer(0.1, 0.01, "the connection broke"),
    ]
    figures = summarize_load("poisson", 2.0, 10.0, answers, Limits(ttft_ms=200, inter_token_ms=20))
    assert figures.seconds == pytest.approx(0.34)
    assert figures.requests == 4
    assert figures.errors == {"the connection broke": 1}
    assert figures.requests_per_second == pytest.approx(3 / 0.34)
    assert figures.goodput == pytest.approx(1 / 0.34)
    assert figures.tokens_per_second == pytest.approx(15 / 0.34)
    assert figures.ttft_p50_ms == pytest.approx(100)
    assert figures.ttft_p99_ms == pytest.approx(300)
    assert figures.inter_token_p99_ms == pytest.approx(50)


def test_the_first_token_is_compared_with_the_servers_own_account(live: str) -> None:
    found = ask(live, lambda client: checks.first_token(client, Texts(client), "fp32"))
    assert found.prompt == 128
    assert found.ratio == found.ttft_ms / found.prefill_ms
    assert found.ratio > 1  # the client's time contains the server's


def test_a_long_prompt_is_sent_among_running_streams(make_app: Callable[..., FastAPI], loads: Loads) -> None:
    seen: list[tuple[int, int]] = []  # (rows that are running, tokens of the chunk) of the long prompt

    def watch(runner: FakeRunner) -> None:
        runner.delay = 0.001

        def on_prefill(slot: int, ids: Any) -> None:
            if len(ids) > checks.STREAM_PROMPT or (seen and slot in runner.held):
                seen.append((len(runner.held), len(ids)))

        runner.on_prefill = on_prefill

    loads.prepare = watch
    with serving(make_app(precisions="fp32", prefill_chunk=64, prefill_chunk_busy=64)) as url:
        found = ask(url, lambda client: checks.long_prompt(client, Texts(client), "fp32"))
    assert found.prompt == 252  # the context of 256, less what is generated
    assert sum(count for _, count in seen) == 252
    assert min(rows for rows, _ in seen) >= checks.STREAMS
    assert found.ratio == found.beside_p99_ms / found.alone_p99_ms
    assert found.meanwhile_p99_ms > 0
