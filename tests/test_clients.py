"""The clients people already have, unchanged, against a real socket."""

import openai
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import UnknownError, ValidationError

from tests.test_generate import PROMPT, greedy


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
    with pytest.raises(openai.BadRequestError) as told:
        client.completions.create(model="fake", prompt="x" * 400)
    assert told.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="chat template"):
        client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "Hi"}])
