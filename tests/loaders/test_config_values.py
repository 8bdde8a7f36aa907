"""A configuration whose values are impossible is refused with its reason; one with unusual values is computed
as by ``transformers``."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import loaders
from loaders.base import ModelSpec
from loaders.checkpoint import open_checkpoint
from loaders.errors import CheckpointError
from loaders.runner import ReportingRunner
from tests import checkpoints
from tests.loaders.test_families import GATED, SIZES

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GATED,
    "mistral": {**GATED, "sliding_window": None},
    "qwen2": GATED,
    "qwen3": {**GATED, "head_dim": 16},
    "gpt_neox": {**SIZES, "intermediate_size": 128},
    "qwen2_moe": {**GATED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                  "shared_expert_intermediate_size": 32},
    "gpt2": {"vocab_size": 320, "n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 4,
             "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0},
}  # fmt: skip
ROTARY = ["llama", "mistral", "qwen2", "qwen3", "gpt_neox"]
WINDOWED = ["mistral", "qwen2", "qwen3"]
EPSILON = {"gpt_neox": "layer_norm_eps", "gpt2": "layer_norm_epsilon"}
BASE = {"rope_type": "default", "rope_theta": 1e4}

Changed = Callable[[str, Mapping[str, Any]], Path]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("originals")
    for family, sizes in FAMILIES.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()
        checkpoints.save(model, place / family)
    return place


@pytest.fixture
def changed(originals: Path, tmp_path: Path) -> Changed:
    """A checkpoint of the family whose config.json has other values; its weights are a link."""

    def make(family: str, values: Mapping[str, Any]) -> Path:
        place = tmp_path / "tiny"
        place.mkdir()
        for file in (originals / family).iterdir():
            (place / file.name).symlink_to(file)
        config = json.loads((originals / family / "config.json").read_text())
        (place / "config.json").unlink()
        (place / "config.json").write_text(json.dumps({**config, **values}))
        return place

    return make


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "nope", "rope_theta": 1e4}, "names an unknown rope_type 'nope'"),
        ({**BASE, "rope_theta": "a"}, "has rope_theta a"),
        ({**BASE, "rope_theta": 0}, "has rope_theta 0"),
        ({**BASE, "rope_theta": -1.0}, "has rope_theta -1.0"),
        ({**BASE, "partial_rotary_factor": 2.0}, "has partial_rotary_factor 2.0"),
        ({"rope_type": "linear", "rope_theta": 1e4}, "Missing required keys.*factor"),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": "x"}, "has factor x"),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": -2.0}, "has factor -2.0"),
        ({"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}, "Missing required keys"),
        ({"rope_type": "yarn", "rope_theta": 1e4}, "Missing required keys"),
        ([1], "rope_parameters"),
        ("x", "rope_parameters"),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ROTARY)
def test_rotary_positions_that_are_impossible(family: str, rope: Any, message: str, changed: Changed) -> None:
    refused(changed(family, {"rope_parameters": rope}), message)


@pytest.mark.parametrize("value", [-1e-5, float("nan"), float("inf"), "x"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_epsilon_that_is_impossible(family: str, value: Any, changed: Changed) -> None:
    key = EPSILON.get(family, "rms_norm_eps")
    refused(changed(family, {key: value}), key)


@pytest.mark.parametrize("window", [0, -4, 1.5, "8", True])
@pytest.mark.parametrize("family", WINDOWED)
def test_an_attention_window_that_is_impossible(family: str, window: Any, changed: Changed) -> None:
    refused(changed(family, {"sliding_window": window, "use_sliding_window": True}), "sliding_window")


def test_sliding_layers_without_a_window(changed: Changed) -> None:
    values = {"layer_types": ["sliding_attention", "full_attention"]}
    refused(changed("qwen3", values), "sliding_attention layers and no sliding_window")


@pytest.mark.parametrize(
    "values",
    [{"num_attention_heads": 3}, {"head_dim": 15}, {"num_key_value_heads": 3}, {"vocab_size": 500}],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_sizes_that_do_not_fit(family: str, values: dict[str, Any], changed: Changed) -> None:
    refused(changed(family, values), "not a valid|does not fit its config.json|describes no model")


def refused(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        loaders.load("fp32", ModelSpec(open_checkpoint(str(folder)), slots=2))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("llama", {"sliding_window": 4}),  # left in the file, and without effect in transformers
        ("llama", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}),
        ("gpt_neox", {"sliding_window": 4}),
        ("mistral", {"sliding_window": 4}),
        ("qwen2", {"sliding_window": 4}),  # unused by default
        ("qwen2_moe", {"sliding_window": 4}),  # unused by default, and then 0
        ("qwen2", {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}),
        ("llama", {"rope_parameters": {**BASE, "partial_rotary_factor": 0.5}}),
        ("gpt_neox", {"rope_parameters": {**BASE, "partial_rotary_factor": 0.5}}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {"n_head": 64}),
    ],
    ids=str,
)
def test_unusual_values_are_computed_as_by_transformers(
    family: str, values: dict[str, Any], changed: Changed
) -> None:
    folder = changed(family, values)
    runner = loaders.load("fp32", ModelSpec(open_checkpoint(str(folder)), slots=2)).runner
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = [7 * i * i % 99 for i in range(60)]
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    runner.prefill(0, ids[:20], "none")
    runner.prefill(1, ids[:3], "none")
    runner.prefill(0, ids[20:59], "none")
    largest = float(expected.abs().max())
    assert torch.allclose(runner.decode([0, 1], [ids[59], 1])[0], expected[-1], rtol=0, atol=1e-4 * largest)
    assert torch.allclose(runner.score(ids), expected, rtol=0, atol=1e-4 * largest)


@pytest.mark.parametrize(
    ("family", "values", "forward", "why"),
    [
        ("llama", {}, "compiled", None),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "transformers' LlamaForCausalLM",
            "its rotary positions are of type 'dynamic'",
        ),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "transformers' GPT2LMHeadModel", "attention"),
    ],
)
def test_the_forward_pass_and_the_reason_for_it_are_reported(
    family: str, values: dict[str, Any], forward: str, why: str | None, changed: Changed
) -> None:
    folder = changed(family, values)
    runner = loaders.load("fp32", ModelSpec(open_checkpoint(str(folder)), slots=2)).runner
    assert isinstance(runner, ReportingRunner)
    report = runner.report()
    assert report["forward"] == forward
    reason = report.get("not_compiled_because")
    assert reason is None if why is None else why in str(reason)
