"""Existing clients, unchanged, against a real socket."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi import FastAPI
from huggingface_hub import InferenceClient
from huggingface_hub.errors import UnknownError, ValidationError

from tests.conftest import serving
from tests.routes.openai.test_openai import TEMPLATE
from tests.routes.test_generate import PROMPT, greedy


def openai_client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def test_huggingface_text(live: str) -> None:
    client = InferenceClient(live)
    assert client.text_generation(PROMPT, max_new_tokens=6) == greedy(6)
    detailed = client.text_generation(PROMPT, max_new_tokens=6, details=True)
    assert detailed.details is not None
    assert detailed.details.finish_reason == "length"
    assert "".join(token.text for token in detailed.details.tokens) == greedy(6)


def test_huggingface_stream(live: str) -> None:
    client = InferenceClient(live)
    assert "".join(client.text_generation(PROMPT, max_new_tokens=6, stream=True)) == greedy(6)
    *_, last = client.text_generation(PROMPT, max_new_tokens=6, stream=True, details=True)
    assert last.generated_text == greedy(6)
    assert last.details is not None
    assert last.details.generated_tokens == 6


def test_huggingface_precision_and_errors(live: str) -> None:
    by_path = InferenceClient(f"{live}/models/fake:bf16")
    assert by_path.text_generation(PROMPT, max_new_tokens=3) == greedy(3)
    with pytest.raises(ValidationError, match="temperature"):
        InferenceClient(live).text_generation(PROMPT, temperature=-1)
    with pytest.raises(UnknownError, match="no such model"):
        InferenceClient(f"{live}/models/other").text_generation(PROMPT)


def test_openai_completion(live: str) -> None:
    client = openai_client(live)
    answer = client.completions.create(
        model="fake", prompt=PROMPT, temperature=0, max_tokens=5, extra_body={"precision": "bf16"}
    )
    assert answer.choices[0].text == greedy(5)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    assert answer.model_dump()["precision"] == "bf16"
    assert {"fake", "fake:bf16"} <= {model.id for model in client.models.list()}
    assert client.models.retrieve("fake:bf16").id == "fake:bf16"


def test_openai_stream(live: str) -> None:
    stream = openai_client(live).completions.create(
        model="fake:bf16", prompt=PROMPT, temperature=0, max_tokens=5, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == greedy(5)


def test_openai_errors(live: str) -> None:
    client = openai_client(live)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="fake", prompt="x" * 400)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="chat template"):
        client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "Hi"}])


def test_their_keys(make_app: Callable[..., FastAPI]) -> None:
    with serving(make_app(api_key="right")) as address:
        assert InferenceClient(address, token="right").text_generation(PROMPT, max_new_tokens=3) == greedy(3)
        with pytest.raises(UnknownError, match="key"):
            InferenceClient(address, token="wrong").text_generation(PROMPT)
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="right", max_retries=0)
        assert client.completions.create(model="fake", prompt=PROMPT, temperature=0).choices[
            0
        ].text == greedy(16)
        with pytest.raises(openai.AuthenticationError, match="key"):
            client.with_options(api_key="wrong").models.list()


def test_the_routes_that_huggingface_expects_of_an_endpoint(live: str) -> None:
    client = InferenceClient(provider="hf-inference")
    assert client.health_check(model=live)
    assert client.get_endpoint_info(model=live)["model_id"] == "fake"


def test_a_conversation(make_app: Callable[..., FastAPI], tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(TEMPLATE)
    with serving(make_app(chat_template=file)) as address:
        said = [{"role": "user", "content": "Hi"}]
        expected = greedy(4, "user: Hi\nassistant:")
        face = InferenceClient(address)
        whole = face.chat_completion(said, max_tokens=4, temperature=0)
        assert whole.choices[0].message.content == expected
        chunks = face.chat_completion(said, max_tokens=4, temperature=0, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
        asked: Any = {"model": "fake:bf16", "messages": said, "max_tokens": 4, "temperature": 0}
        client = openai_client(address)
        assert client.chat.completions.create(**asked).choices[0].message.content == expected
        stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        *earlier, last = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in earlier) == expected
        assert last.usage.completion_tokens == 4
