"""Requests of every kind in one batch, over HTTP and on real weights: each gets the same text as alone."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import checkpoints
from tests.conftest import entered, until

PRECISIONS = ["fp32", "nf4", "dynamic-int8"]
OVERRIDES: list[dict[str, Any]] = [
    {},
    {"stop": ["a"]},
    {"temperature": 0.7, "seed": 1},
    {"temperature": 2.5, "seed": 1},
    {"temperature": 1.5, "seed": 2, "top_k": 3},
    {"top_k": 40, "seed": 3, "stop": ["th", "e"]},
    {"top_p": 0.3, "seed": 4},
    {"top_p": 0.95, "seed": 4, "max_new_tokens": 5},
    {"typical_p": 0.5, "seed": 5},
    {"min_p": 0.05, "seed": 6},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 1.3, "temperature": 1.2, "seed": 7},
    {"frequency_penalty": 1.5, "presence_penalty": -0.5},
    {"do_sample": True, "seed": 8, "best_of": 2},
    {"do_sample": True, "seed": 9, "max_new_tokens": 40, "top_n_tokens": 2},
]
PROMPTS = ["the theatre in an era " * (1 + i % 4) + "abcdef"[: i % 6] for i in range(len(OVERRIDES))]
FIXED: dict[str, Any] = {"max_new_tokens": 24, "ignore_eos": True, "details": True, "seed": 0}
BODIES = [
    {**FIXED, "inputs": prompt, **overrides} for prompt, overrides in zip(PROMPTS, OVERRIDES, strict=True)
]


def shown(reply: httpx.Response) -> tuple[Any, ...]:
    answer = reply.json()
    ids = [token["id"] for token in answer["details"]["tokens"]]
    return answer["generated_text"], ids, answer["details"]["finish_reason"], answer["details"]["seed"]


async def large_batches(client: httpx.AsyncClient, precision: str) -> float:
    """Steps that decoded more than eight rows."""
    counted = [
        float(line.rsplit(" ", 1)[1])
        for line in (await client.get("/metrics")).text.splitlines()
        if line.startswith("bitdial_batch_size_bucket") and f'precision="{precision}"' in line
        if 'le="8.0"' in line or 'le="+Inf"' in line
    ]
    return counted[1] - counted[0]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_each_row_is_the_same_alone(family: str, tmp_path: Path) -> None:
    from server.app import create_app
    from server.settings.server import Settings

    async def main() -> None:
        app = create_app(Settings(model_id=str(folder), precisions=",".join(PRECISIONS), device="cpu"))
        async with entered(app) as client:
            for precision in PRECISIONS:
                asked = [{**body, "precision": precision} for body in BODIES]
                alone = [shown(await client.post("/generate", json=body)) for body in asked]
                together = await asyncio.gather(*(client.post("/generate", json=body) for body in asked))
                assert [shown(reply) for reply in together] == alone
                assert len({text for text, *_ in alone}) > len(alone) / 2  # the settings had an effect
                assert await large_batches(client, precision)
            await until(lambda: not app.state.service.places.in_flight)

    folder = checkpoints.save(
        {"gpt2": checkpoints.gpt2, "llama": checkpoints.llama}[family](), tmp_path / "m"
    )
    asyncio.run(main())
