"""The times of a choice in a stream of the OpenAI API."""

from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.routes.openai.test_openai import chunks
from tests.routes.openai.test_openai_extras import SAID
from tests.routes.test_generate import PROMPT


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_choices_times_are_in_its_last_chunk(make_chatty: Callable[..., TestClient], path: str) -> None:
    client = make_chatty()
    body: dict[str, Any] = {"prompt": PROMPT} if path == "/v1/completions" else {"messages": SAID}
    sent = {**body, "stream": True, "n": 2, "max_tokens": 3, "temperature": 0.1, "ignore_eos": True}
    ended = {}
    for chunk in chunks(client.post(path, json=sent).text):
        [choice] = chunk["choices"]
        assert ("timings" in chunk) == (choice["finish_reason"] is not None)
        if "timings" in chunk:
            ended[choice["index"]] = chunk["timings"]
    native = client.post("/generate", json={"inputs": PROMPT, "max_new_tokens": 3}).json()["timings"]
    assert sorted(ended) == [0, 1]
    for found in ended.values():
        assert found.keys() == native.keys()
        assert 0 < found["prefill_ms"] < found["total_ms"]
        assert found["decode_ms"] > 0
