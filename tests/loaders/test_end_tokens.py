"""Which tokens end a text: generation_config.json before config.json, and always the tokenizer's own."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config

from loaders.checkpoint import load_tokenizer, open_checkpoint
from loaders.end_tokens import configured, with_end_token
from tests import checkpoints


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (5, 7, {7}),
        (5, [7, 8], {7, 8}),
        ([5, 6], None, {5, 6}),
        (None, 7, {7}),
        (None, None, set()),
        (5, "seven", {5}),
        (5, [], {5}),
    ],
)
def test_end_tokens_named_by_the_configurations(
    tmp_path: Path, config: Any, generation: Any, expected: set[int]
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert configured(tmp_path, GPT2Config(eos_token_id=config)) == expected


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", b"\xff", "[" * 100_000])
def test_without_a_usable_generation_config(tmp_path: Path, content: str | bytes | None) -> None:
    if content is not None:
        (tmp_path / "generation_config.json").write_bytes(
            content if isinstance(content, bytes) else content.encode()
        )
    assert configured(tmp_path, GPT2Config(eos_token_id=5)) == {5}


def test_a_nested_text_model(tmp_path: Path) -> None:
    class Outer:
        eos_token_id = 5
        text_config = GPT2Config(eos_token_id=6)

        def get_text_config(self) -> GPT2Config:
            return self.text_config

    outer = Outer()
    assert configured(tmp_path, outer) == {6}
    outer.text_config = GPT2Config(eos_token_id=None)
    assert configured(tmp_path, outer) == {5}


def test_the_tokenizers_own(tmp_path: Path) -> None:
    model = checkpoints.gpt2()
    model.config.eos_token_id = 5
    model.generation_config.eos_token_id = [7, 8]
    checkpoint = open_checkpoint(str(checkpoints.save(model, tmp_path)))
    assert checkpoint.eos_ids == {7, 8}
    tokenizer = load_tokenizer(checkpoint)
    assert with_end_token(checkpoint, tokenizer).eos_ids == {0, 7, 8}
    tokenizer.eos_token = None
    assert with_end_token(checkpoint, tokenizer).eos_ids == {7, 8}
