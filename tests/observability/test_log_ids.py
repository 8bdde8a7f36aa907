"""JSON log lines of a request name it and its trace."""

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.observability.logs import JsonFormatter
from tests.observability.collector import Collector
from tests.observability.test_tracing import PARENT, TRACE, TRACEPARENT

BODY = {"inputs": "abc", "max_new_tokens": 2}
IDS = ("request_id", "trace_id", "span_id")


class Lines(logging.Handler):
    """Formats records where they are logged, as the stream's handler does."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter())
        self.lines: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(json.loads(self.format(record)))

    def of(self, request_id: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line.get("request_id") == request_id]


@pytest.fixture
def log() -> Iterator[Lines]:
    lines, logger = Lines(), logging.getLogger("server")
    logger.addHandler(lines)
    logger.setLevel("INFO")  # restored by process_logging
    yield lines
    logger.removeHandler(lines)


def headers(id_: str, flags: str = "01") -> dict[str, str]:
    return {"X-Request-ID": id_, "traceparent": f"00-{TRACE}-{PARENT}-{flags}"}


def break_tokenizer(client: TestClient) -> None:
    """A fault that no one foresaw, logged with its traceback."""

    def fail(*_: object) -> None:
        raise RuntimeError("unforeseen")

    client.app.state.service.prompts.encode = fail  # type: ignore[attr-defined]


def test_a_traced_request_s_lines_have_all_three(
    make_client: Callable[..., TestClient], collector: Collector, log: Lines
) -> None:
    client = make_client(otlp_endpoint=collector.address)
    client.post("/generate", json=BODY, headers=headers("whole"))
    client.post("/generate_stream", json=BODY, headers=headers("stream"))
    client.post("/generate", json=BODY, headers=headers("unsampled", "00"))
    client.get("/precisions", headers=headers("other"))
    break_tokenizer(client)
    client.post("/generate", json=BODY, headers=headers("broken"))
    client.__exit__(None, None, None)
    spans = {span.span_id.hex(): span for span in collector.spans("POST")}
    for name, count in (("whole", 1), ("stream", 1), ("broken", 2)):
        found = log.of(name)
        assert len(found) == count, name
        assert {line["trace_id"] for line in found} == {TRACE}
        (span_id,) = {line["span_id"] for line in found}
        assert spans[span_id].parent_span_id.hex() == PARENT
    assert "unforeseen" in log.of("broken")[0]["exception"]
    for name in ("unsampled", "other"):
        assert [sorted(set(line) & set(IDS)) for line in log.of(name)] == [["request_id"]]


def test_without_a_collector_lines_have_the_request_s_id(client: TestClient, log: Lines) -> None:
    client.post("/generate", json=BODY, headers=headers("plain"))
    break_tokenizer(client)
    client.post("/generate", json=BODY, headers=headers("broken"))
    assert [len(log.of(name)) for name in ("plain", "broken")] == [1, 2]
    assert not any("trace_id" in line for line in log.lines)


def test_what_a_request_starts_is_logged_as_its_own(client: TestClient, log: Lines) -> None:
    client.post("/precisions/fp16/load", headers={"X-Request-ID": "loads"})
    assert any("fp16" in line["message"] and line["logger"] != "server.access" for line in log.of("loads"))


def test_other_lines_have_no_ids(log: Lines) -> None:
    logging.getLogger("server").info("at the start")
    (line,) = log.lines
    assert not set(line) & set(IDS)


def test_a_refusal_below_the_framework_names_its_trace(
    make_client: Callable[..., TestClient], collector: Collector, log: Lines
) -> None:
    import asyncio

    client = make_client(otlp_endpoint=collector.address, max_concurrent_requests=1)
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\ntraceparent: {TRACEPARENT['traceparent']}\r\n\r\n"

    async def judge() -> None:
        client.app.state.early_refusal.judge(head.encode())  # type: ignore[attr-defined]

    with client.app.state.service.places.reserved():  # type: ignore[attr-defined]
        asyncio.run(judge())
    (line,) = [line for line in log.lines if line.get("status") == 429]
    assert line["trace_id"] == TRACE
    client.__exit__(None, None, None)
    (span,) = collector.spans()
    assert line["span_id"] == span.span_id.hex()
