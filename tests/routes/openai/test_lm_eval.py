"""The requests of lm-evaluation-harness (0.4.13), and how it reads the responses."""

from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from server.app import create_app
from server.settings.server import Settings
from tests import checkpoints
from tests.conftest import wait_until

PROMPTS = [list(range(40, 70)), [65, 66, 67], [*range(100, 160), 32, 33]]
CONTEXTS = [20, 1, 60]
"""Tokens of each prompt that are context; the rest is scored."""


@pytest.fixture(scope="module")
def model() -> Any:
    return checkpoints.gpt2()


@pytest.fixture(scope="module")
def client(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = checkpoints.save(model, tmp_path_factory.mktemp("tiny"))
    app = create_app(Settings(model_id=str(folder), precisions="fp32,nf4", device="cpu", threads=1))
    with TestClient(app) as found:
        wait_until(lambda: app.state.pool.state("nf4").state == "loaded")
        yield found


def request_of(client: TestClient, precision: str) -> dict[str, Any]:
    """Like ``LocalCompletionsAPI._create_payload``, for a batch of token ids."""
    app: Any = client.app
    return {
        "model": f"{app.state.default.checkpoint.model_id}:{precision}",
        "prompt": PROMPTS,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }


def parsed(output: dict[str, Any]) -> list[tuple[float, bool]]:
    """Like ``LocalCompletionsAPI.parse_logprobs``: a continuation's log-probability; whether it is greedy."""
    found = []
    for choice, context in zip(sorted(output["choices"], key=itemgetter("index")), CONTEXTS, strict=True):
        columns = choice["logprobs"]
        logprobs, tops = columns["token_logprobs"][context:-1], columns["top_logprobs"][context:-1]
        greedy = all(one == max(top.values()) for one, top in zip(logprobs, tops, strict=True))
        found.append((sum(logprobs), greedy))
    return found


def by_hand(model: Any) -> list[tuple[float, bool]]:
    found = []
    for ids, context in zip(PROMPTS, CONTEXTS, strict=True):
        with torch.inference_mode():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        wanted = ids[context:]
        rows = logprobs[context - 1 : -1]
        true = rows.gather(1, torch.tensor(wanted)[:, None])[:, 0]
        found.append((float(true.sum()), rows.argmax(-1).tolist() == wanted))
    return found


def test_a_continuation_has_the_models_own_log_probability(client: TestClient, model: Any) -> None:
    reply = client.post("/v1/completions", json=request_of(client, "fp32"))
    assert reply.status_code == 200, reply.text
    found, expected = parsed(reply.json()), by_hand(model)
    for (logprob, greedy), (true, truly_greedy) in zip(found, expected, strict=True):
        assert logprob == pytest.approx(true, abs=1e-3)
        assert greedy == truly_greedy
    lengths = [len(choice["logprobs"]["token_logprobs"]) for choice in reply.json()["choices"]]
    assert lengths == [len(ids) + 1 for ids in PROMPTS]  # the prompt's, and the one token that was generated


def test_a_greedy_text_has_the_top_log_probabilities(client: TestClient, model: Any) -> None:
    with torch.inference_mode():
        ids = model.generate(torch.tensor([[65, 66]]), max_new_tokens=5, do_sample=False, pad_token_id=0)
    body = {**request_of(client, "fp32"), "prompt": ids.tolist()}
    columns = client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    for logprob, top in zip(columns["token_logprobs"][2:-1], columns["top_logprobs"][2:-1], strict=True):
        assert logprob == max(top.values())


def test_another_precision_scores_otherwise(client: TestClient) -> None:
    full, quantized = (
        client.post("/v1/completions", json=request_of(client, name)).json() for name in ("fp32", "nf4")
    )
    assert quantized["precision"] == "nf4"
    for (one, _), (other, _) in zip(parsed(full), parsed(quantized), strict=True):
        assert one != other
        assert other == pytest.approx(one, rel=0.3)


def test_the_tasks_data_can_be_made(tmp_path: Path) -> None:
    import json
    import runpy

    root = Path(__file__).resolve().parents[3]
    runpy.run_path(str(root / "scripts" / "lm_eval" / "make_data.py"))["main"](tmp_path)
    for name in ("python_docs", "python_docs_perplexity"):
        assert f"test: {name}.jsonl" in (root / "scripts" / "lm_eval" / f"{name}.yaml").read_text()
        assert (tmp_path / f"{name}.jsonl").read_text().count("\n") > 20
    for line in (tmp_path / "python_docs.jsonl").read_text().splitlines():
        question = json.loads(line)
        assert len(set(question["choices"])) == 4
        assert 0 <= question["answer"] < 4
