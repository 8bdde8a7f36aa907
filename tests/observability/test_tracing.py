"""The trace of a request, as a collector receives it: its span, its generations', and their phases'."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from starlette.testclient import TestClient

from server.http.connection.early_refusal import Refusal
from tests.observability.collector import attributes_of
from tests.observability.conftest import Observed

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
GENERATION = "text_completion fake"


def generated(ended: Any) -> tuple[int, int]:
    return ended.start_time_unix_nano, ended.end_time_unix_nano


def test_a_request_s_spans_lie_inside_each_other(observed: Observed) -> None:
    before = time.time_ns()
    body = {"inputs": "abc", "parameters": {"max_new_tokens": 5}}
    found = observed(lambda client: client.post("/generate", json=body))
    names = {span.name: span for span in found.spans()}
    assert len(found.spans()) == len(names) == 5
    request, generation = names["POST /generate"], names[GENERATION]
    phases = [names[name] for name in ("queue", "prefill", "decode")]
    assert (request.kind, generation.kind) == (Span.SPAN_KIND_SERVER, Span.SPAN_KIND_INTERNAL)
    assert not request.parent_span_id
    assert generation.parent_span_id == request.span_id
    assert {phase.parent_span_id for phase in phases} == {generation.span_id}
    assert {span.trace_id for span in names.values()} == {request.trace_id}
    assert before < request.start_time_unix_nano <= generation.start_time_unix_nano
    assert generation.end_time_unix_nano <= request.end_time_unix_nano < time.time_ns()
    times = [generated(phase) for phase in phases]
    assert times[0][0] == generation.start_time_unix_nano
    assert times[2][1] == generation.end_time_unix_nano
    assert times[0][1] == times[1][0]  # each begins when the one before ends
    assert times[1][1] == times[2][0]
    assert all(began < ended for began, ended in times)


def test_the_times_are_those_of_the_answer(observed: Observed) -> None:
    answers: list[Any] = []
    body = {"inputs": "abc", "max_new_tokens": 5}
    found = observed(lambda client: answers.append(client.post("/generate", json=body).json()))
    spans = {span.name: span for span in found.spans()}
    for name, key in {
        **{n: f"{n}_ms" for n in ("queue", "prefill", "decode")},
        GENERATION: "total_ms",
    }.items():
        began, ended = generated(spans[name])
        assert (ended - began) / 1e6 == pytest.approx(answers[0]["timings"][key], abs=0.002), name


def test_a_generation_has_the_conventions_attributes(observed: Observed) -> None:
    sampling = {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.5, "seed": 3}
    body = {"inputs": "abc", "precision": "bf16", "parameters": {"max_new_tokens": 5, **sampling}}
    headers = {"X-Request-ID": "my-own-id"}
    found = observed(lambda client: client.post("/generate", json=body, headers=headers))
    (generation,) = found.spans(GENERATION)
    assert attributes_of(generation) == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "bitdial",
        "gen_ai.request.model": "fake",
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.7,
        "gen_ai.request.top_k": 9,
        "gen_ai.request.top_p": 0.5,
        "gen_ai.request.seed": 3,
        "gen_ai.response.model": "fake",
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.output_tokens": 5,
        "bitdial.precision": "bf16",
        "bitdial.outcome": "success",
        "bitdial.request_id": "my-own-id",
    }
    (request,) = found.spans("POST")
    assert attributes_of(request) == {
        "http.request.method": "POST",
        "http.route": "/generate",
        "http.response.status_code": 200,
        "url.path": "/generate",
        "url.scheme": "http",
        "bitdial.request_id": "my-own-id",
    }
    (prefill,), (decode,) = found.spans("prefill"), found.spans("decode")
    assert attributes_of(prefill) == {"bitdial.computed_tokens": 3, "bitdial.cached_tokens": 0}
    assert attributes_of(decode) == {"bitdial.generated_tokens": 5, "bitdial.preemptions": 0}
    assert {attributes_of(one.resource)["service.name"] for one in found.traces()} == {"bitdial"}


def test_a_streamed_completion(observed: Observed) -> None:
    answers: list[str] = []
    body = {"prompt": "abc", "max_tokens": 4, "stream": True, "temperature": 0, "frequency_penalty": 0.5}
    found = observed(lambda client: answers.append(client.post("/v1/completions", json=body).text))
    (generation,) = found.spans(GENERATION)
    attributes = attributes_of(generation)
    assert attributes["gen_ai.request.stream"] is True
    assert attributes["gen_ai.request.temperature"] == 0.0
    assert attributes["gen_ai.request.frequency_penalty"] == 0.5
    assert "gen_ai.request.seed" not in attributes  # nothing is drawn
    assert f'"id":"{attributes["gen_ai.response.id"]}"' in answers[0].replace(" ", "")
    (decode,) = found.spans("decode")
    first = (decode.start_time_unix_nano - generation.start_time_unix_nano) / 1e9
    assert attributes["gen_ai.response.time_to_first_chunk"] == pytest.approx(first, abs=1e-5)


def test_a_chat_that_a_stop_string_ends(make_chatty: Callable[..., TestClient], collector: Any) -> None:
    client = make_chatty(otlp_endpoint=collector.address)
    body = {"messages": [{"role": "user", "content": "secret words"}], "max_tokens": 20, "temperature": 0}
    text = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    client.post("/v1/chat/completions", json={**body, "stop": text[3:6]})
    client.__exit__(None, None, None)
    whole, stopped = (attributes_of(span) for span in collector.spans("chat fake"))
    assert whole["gen_ai.operation.name"] == stopped["gen_ai.operation.name"] == "chat"
    assert whole["gen_ai.response.finish_reasons"] == ["length"]
    assert stopped["gen_ai.response.finish_reasons"] == ["stop"]
    everything = b"".join(resource.SerializeToString() for resource in collector.traces())
    assert b"secret" not in everything
    assert text[:6].encode() not in everything


def test_the_generations_of_a_request_are_in_one_trace(observed: Observed) -> None:
    body = {"prompt": ["a", "bb"], "n": 2, "max_tokens": 2}
    found = observed(lambda client: client.post("/v1/completions", json=body))
    (request,) = found.spans("POST /v1/completions")
    generations = found.spans(GENERATION)
    assert len(generations) == 4
    assert {span.parent_span_id for span in generations} == {request.span_id}


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/v1/completions"])
def test_the_caller_s_trace_continues(observed: Observed, path: str) -> None:
    body: dict[str, Any] = {"prompt": "abc"}

    def ask(client: TestClient) -> None:
        client.post(path, json=body, headers=TRACEPARENT)
        client.post(path, json=body)

    first, second = observed(ask).spans("POST")
    assert (first.trace_id.hex(), first.parent_span_id.hex()) == (TRACE, PARENT)
    assert second.trace_id.hex() != TRACE  # no state of one request remains for the next
    assert not second.parent_span_id


@pytest.mark.parametrize("parent", ["nonsense", f"00-{'0' * 32}-{PARENT}-01", "é" * 4000, ""])
def test_a_broken_traceparent_is_no_parent(observed: Observed, parent: str) -> None:
    headers = {"traceparent": parent.encode("latin-1")}
    found = observed(lambda client: client.post("/generate", json={"inputs": "abc"}, headers=headers))
    assert not found.spans("POST")[0].parent_span_id


def test_a_caller_s_sampling_decision_is_respected(observed: Observed) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
    found = observed(lambda client: client.post("/generate", json={"inputs": "abc"}, headers=headers))
    assert found.spans() == []


def test_other_requests_have_no_span(observed: Observed) -> None:
    def ask(client: TestClient) -> None:
        for path in ("/metrics", "/stats", "/precisions", "/nowhere"):
            client.get(path, headers=TRACEPARENT)

    assert observed(ask).spans() == []


def test_a_failed_generation_is_marked(observed: Observed, loads: Any) -> None:
    def fail(slots: object) -> None:
        raise RuntimeError("no")

    def ask(client: TestClient) -> None:
        loads.runners["fp32"].on_decode = fail
        assert client.post("/generate", json={"inputs": "secret words"}).status_code == 424

    found = observed(ask)
    (generation,), (request,) = found.spans(GENERATION), found.spans("POST")
    assert attributes_of(generation)["error.type"] == "generation"
    assert generation.status.code == generation.status.STATUS_CODE_ERROR
    assert attributes_of(request)["http.response.status_code"] == 424
    assert [span.name for span in found.spans()].count("decode") == 1  # it got so far
    assert not any(b"secret" in span.SerializeToString() for span in found.spans())


def test_what_never_got_a_slot_has_queued_only(observed: Observed, loads: Any) -> None:
    def ask(client: TestClient) -> None:
        loads.runners["fp32"].delay = 0.3
        client.post("/v1/completions", json={"prompt": ["a", "b"], "max_tokens": 1})

    found = observed(ask, max_batch_size=1, request_timeout=0.2)
    (late,) = (s for s in found.spans(GENERATION) if attributes_of(s)["bitdial.outcome"] == "timeout")
    assert attributes_of(late)["error.type"] == "timeout"
    (queue,) = (span for span in found.spans() if span.parent_span_id == late.span_id)
    assert queue.name == "queue"
    assert queue.end_time_unix_nano == late.end_time_unix_nano


def test_a_refusal_is_a_span_too(observed: Observed) -> None:
    def ask(client: TestClient) -> None:
        with client.app.state.service.places.reserved():  # type: ignore[attr-defined]
            assert client.post("/v1/chat/completions", json={"messages": []}).status_code == 429

    found = observed(ask, max_concurrent_requests=1)
    (refusal,), (request,) = found.spans("chat fake"), found.spans("POST")
    assert attributes_of(refusal)["error.type"] == "overloaded"
    assert attributes_of(refusal)["bitdial.precision"] == "unread"
    assert refusal.parent_span_id == request.span_id
    assert attributes_of(request)["http.response.status_code"] == 429


def test_a_refusal_below_the_framework_is_a_span_of_its_trace(observed: Observed) -> None:
    traceparent = TRACEPARENT["traceparent"]
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\ntraceparent: {traceparent}\r\nx-request-id: mine\r\n"

    def ask(client: TestClient) -> None:
        async def judge() -> object:
            app = client.app
            return app.state.early_refusal.judge(head.encode() + b"\r\n")  # type: ignore

        with client.app.state.service.places.reserved():  # type: ignore[attr-defined]
            assert isinstance(asyncio.run(judge()), Refusal)

    (span,) = observed(ask, max_concurrent_requests=1).spans()
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert span.kind == Span.SPAN_KIND_SERVER  # it has no request's span around it
    assert attributes_of(span)["error.type"] == "overloaded"
    assert attributes_of(span)["bitdial.request_id"] == "mine"


def test_a_key_in_a_path_is_not_sent(observed: Observed) -> None:
    headers = {"Authorization": "Bearer secret-key"}
    body = {"inputs": "abc"}
    found = observed(
        lambda client: client.post("/models/secret-key/generate", json=body, headers=headers),
        api_key="secret-key",
    )
    (request,) = found.spans("POST")
    assert attributes_of(request)["http.route"] == "/models/{model:path}/generate"
    assert b"secret-key" not in request.SerializeToString()
