"""Names of models that are unusual in an address, or mean something else there: each names its model."""

from collections.abc import Iterator
from functools import partial
from urllib.parse import quote

import httpx
import openai
import pytest
from huggingface_hub import InferenceClient

from loaders.base import LoadedModel, ModelSpec, Progress, ignore_progress
from server.app import create_app
from server.served_model import Wanted
from server.settings.server import Settings
from tests.conftest import PATIENCE, serving
from tests.fakes import FakeRunner, fake_checkpoint, fake_model

NAMES = ["plain", "owner/one", "my model", "modèle", "模型", "100%", "a%2Fb", "q?a=b&c#d", "int8", "x:y",
         "generate", "models", "v1", "stats", "owner/generate", "v1/models", "tgi"]  # fmt: skip
_FIRST = 100


def says(name: str) -> str:
    """What the model of that name continues every prompt with."""
    return chr(ord("a") + NAMES.index(name)) * 3


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a server with a model for each name, told apart by their contexts."""

    def load(precision: str, spec: ModelSpec, progress: Progress = ignore_progress) -> LoadedModel:
        runner = FakeRunner(spec.slots, spec.max_tokens)
        runner.next_id = lambda ids: 65 + spec.max_tokens - _FIRST  # type: ignore[method-assign]
        return fake_model(precision, runner)

    folder, settings = tmp_path_factory.mktemp("models"), Settings(precisions="fp32", device="cpu")
    first, *others = [
        Wanted(partial(fake_checkpoint, folder / str(at), _FIRST + at), settings, name=name)
        for at, name in enumerate(NAMES)
    ]
    with serving(create_app(settings, first=first, others=others, load=load)) as found:
        yield found


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[httpx.Client]:
    """Without certificates, which each client would take 30 ms to read."""
    with httpx.Client(base_url=address, timeout=PATIENCE, verify=False) as found:
        yield found


@pytest.mark.parametrize("name", NAMES)
def test_it_is_named_in_path_query_and_body(client: httpx.Client, name: str) -> None:
    body, text = {"inputs": "x", "max_new_tokens": 3}, says(name)
    in_path, encoded = quote(name), quote(name, safe="")
    for path in (in_path, encoded):
        answer = client.post(f"/models/{path}/generate", json=body).json()
        assert (answer["generated_text"], answer["precision"]) == (text, "fp32")
        precise = client.post(f"/models/{path}:bf16/generate", json=body).json()
        assert (precise["generated_text"], precise["precision"]) == (text, "bf16")
    answer = client.post(f"/generate?model={encoded}", json=body).json()
    assert answer["generated_text"] == text
    for path in ("stats", "info", "precisions", "health/ready"):
        assert client.get(f"/{path}?model={encoded}").status_code == 200, path
    assert client.get(f"/stats?model={encoded}").json()["model"]["id"] == name


@pytest.mark.parametrize("name", NAMES)
def test_the_official_clients_name_it(address: str, name: str) -> None:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    assert client.models.retrieve(name).id == name
    assert client.models.retrieve(f"{name}:bf16").id == f"{name}:bf16"
    asked = client.completions.create(model=f"{name}:bf16", prompt="x", max_tokens=3, temperature=0)
    assert (asked.choices[0].text, asked.model) == (says(name), f"{name}:bf16")
    under_path = openai.OpenAI(base_url=f"{address}/models/{quote(name)}/v1", api_key="none", max_retries=0)
    nested = under_path.completions.create(model=name, prompt="x", max_tokens=3, temperature=0)
    assert nested.choices[0].text == says(name)
    hub = InferenceClient(f"{address}/models/{quote(name)}")
    if not name.endswith("/generate"):  # there that is the route of a model named like the owner
        assert hub.text_generation("x", max_new_tokens=3) == says(name)
    endpoint = InferenceClient(provider="hf-inference")
    info = endpoint.get_endpoint_info(model=f"{address}/models/{quote(name)}")
    assert (info["model_id"], info["models"]) == (name, NAMES)
    assert endpoint.health_check(model=f"{address}/models/{quote(name)}")


def test_the_list_has_each_of_them(address: str) -> None:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    listed = [model.id for model in client.models.list()]
    assert len(set(listed)) == len(listed)
    assert {*NAMES, *(f"{name}:fp32" for name in NAMES)} <= set(listed)
