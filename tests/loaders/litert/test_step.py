"""Families computed in steps: transformers' forward with the cache outside; others are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from loaders.errors import CheckpointError
from loaders.litert.convert import load_checked
from loaders.litert.step import CacheShape, Step, inputs
from tests import checkpoints, decoders

LENGTH = 16
HIDDEN = torch.finfo(torch.float32).min


def past_mask(past: int, window: int | None) -> Tensor:
    """Of one token that follows ``past`` others."""
    mask = torch.zeros(1, 1, LENGTH)
    mask[..., past:] = HIDDEN
    if window is not None:
        mask[..., : max(0, past - window + 1)] = HIDDEN
    return mask


def new_states(model: Any, shape: CacheShape, windows: dict[str, int | None], text: Tensor) -> Any:
    """Keys and values of a text, computed in one step that has no past."""
    given = inputs(shape, len(windows), 1, len(text), LENGTH)
    for mask in given["masks"]:
        mask.fill_(HIDDEN)
    given["tokens"], given["positions"] = text[None], torch.arange(len(text))[None]
    return Step(model, shape, windows, len(text))(**given)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "gemma", "gpt_neox"])
def test_rows_of_different_lengths_are_computed_as_by_the_model_itself(name: str, tmp_path: Path) -> None:
    folder = checkpoints.save(decoders.make(name), tmp_path / "model")
    model, shape, windows = load_checked(folder)
    texts = [torch.arange(20, 34), torch.arange(40, 49)]
    given: dict[str, Any] = inputs(shape, len(windows), 2, 1, LENGTH)
    reference: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        for row, text in enumerate(texts):
            past = len(text) - 1
            found = new_states(model, shape, windows, text[:-1])
            for layer in range(shape.layers):
                for side in ("keys", "values"):
                    given[side][row * shape.layers + layer][:, :past] = found[f"new_{side}_{layer}"][0]
            given["tokens"][row], given["positions"][row] = text[-1], past
            for kind, window in enumerate(windows.values()):
                given["masks"][kind * 2 + row] = past_mask(past, window)
        logits = Step(model, shape, windows, 1)(**given)["logits"]
        for row, text in enumerate(texts):
            expected = reference(text[None]).logits[0, -1]
            assert float((logits[row, 0] - expected).norm() / expected.norm()) < 1e-4


def test_scores_are_capped_as_by_the_model_itself(tmp_path: Path) -> None:
    """Checked on the way: a cap of 1 changes most of these scores."""
    sizes: dict[str, Any] = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = AutoConfig.for_model("gemma2", **sizes, attn_logit_softcapping=1.0, initializer_range=0.5)
    torch.manual_seed(0)
    folder = checkpoints.save(AutoModelForCausalLM.from_config(config), tmp_path / "gemma2")
    model, _, _ = load_checked(folder)
    assert type(model).__name__ == "Gemma2ForCausalLM"


def test_layers_of_two_kinds_have_a_mask_each(tmp_path: Path) -> None:
    folder = checkpoints.save(decoders.make("qwen2"), tmp_path / "model")
    assert load_checked(folder)[2] == {"full_attention": None, "sliding_attention": 9}


def test_an_architecture_with_attention_of_its_own_is_refused(tmp_path: Path) -> None:
    """BLOOM's ALiBi depends on the cache's length."""
    config = AutoConfig.for_model("bloom", vocab_size=320, hidden_size=64, n_layer=1, n_head=2)
    torch.manual_seed(0)
    folder = checkpoints.save(AutoModelForCausalLM.from_config(config), tmp_path / "bloom")
    with pytest.raises(CheckpointError):
        load_checked(folder)
