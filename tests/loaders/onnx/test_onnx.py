"""What is particular to models on ONNX Runtime: moved rows, refused architectures, a missing extra."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import loaders
from loaders.base import LoadedModel, ModelSpec
from loaders.checkpoint import open_checkpoint
from loaders.errors import CheckpointError, PrecisionUnavailable
from loaders.onnx import session
from tests import checkpoints

SIZES: dict[str, Any] = {
    "vocab_size": checkpoints.VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0, "intermediate_size": 128,
}  # fmt: skip
TEXTS = {0: [40, 41, 42], 1: [7] * 21, 2: [90, 91, 92, 93], 3: [200, 5, 6, 7, 8, 9]}


@pytest.fixture(scope="module")
def precision() -> str:
    return "onnx-int8"


def test_rows_that_change_places_keep_their_texts(model: LoadedModel) -> None:
    """Steps of slots in any order and with gaps give each slot the bits that it gets alone."""
    steps = [[3, 0], [1, 3], [2], [0, 2, 1, 3], [3, 1], [0, 2]]

    def decoded(only: int | None) -> dict[int, list[torch.Tensor]]:
        runner, found = model.runner, {slot: list[torch.Tensor]() for slot in TEXTS}
        for slot, ids in TEXTS.items():
            runner.prefill(slot, ids)
        for step, slots in enumerate(steps):
            chosen = [slot for slot in slots if only in (None, slot)]
            if chosen:
                logits = runner.decode(chosen, [60 + step + slot for slot in chosen]).clone()
                for slot, row in zip(chosen, logits, strict=True):
                    found[slot].append(row)
        for slot in TEXTS:
            runner.free(slot)
        return found

    together = decoded(None)
    for slot in TEXTS:
        for one, other in zip(together[slot], decoded(slot)[slot], strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, "is in no linear layer"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "depend on the length",
        ),
    ],
)
def test_what_a_graph_cannot_hold_is_refused_before_any_work(
    family: str, changes: dict[str, Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **changes))
    spec = ModelSpec(open_checkpoint(str(checkpoints.save(model, tmp_path / family))))
    monkeypatch.setattr("loaders.precisions.onnx.load_pretrained", None)
    with pytest.raises(CheckpointError, match=f"{family} can't be served in onnx-int8: .*{reason}"):
        loaders.load("onnx-int8", spec)


def test_a_missing_extra_is_named_with_its_command(
    small_spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "find_spec", lambda name: None)
    with pytest.raises(PrecisionUnavailable, match=r"onnx is not installed.*pip install 'bitdial\[onnx\]'"):
        loaders.load("onnx-fp32", small_spec)
