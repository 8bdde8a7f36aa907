"""Keys and values beyond float16: the cache is widened or the request fails; no result is silently wrong."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

import loaders
from loaders import kernels
from loaders.base import ModelSpec
from loaders.checkpoint import open_checkpoint
from loaders.cuda.static_cache import Shape, StaticCache
from loaders.errors import CheckpointError
from loaders.runners.decoder_cpu_runner import DecoderCPURunner
from tests import checkpoints

compiled = pytest.mark.skipif(kernels.get() is None, reason=str(kernels.find()))
WIDTH, PROMPT = 64, list(range(30, 70))
UP, DOWN = 2.0**24, 2.0**-30  # exact in every type of weight


def scaled(keys: float, values: float) -> GPT2LMHeadModel:
    """The function of ``checkpoints.gpt2()``, rescaled: queries and output undo the scaling of the rest."""
    model = checkpoints.gpt2()
    with torch.no_grad():
        for block in model.transformer.h:
            attention = block.attn
            for tensor in (attention.c_attn.weight, attention.c_attn.bias):
                tensor[..., :WIDTH] /= keys
                tensor[..., WIDTH : 2 * WIDTH] *= keys
                tensor[..., 2 * WIDTH :] *= values
            attention.c_proj.weight /= values
    return model


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative error. Rounding to float16, and then to int8, causes up to 0.014; lost values about 1."""
    return float((found - expected).norm() / expected.norm())


def spec_of(model: GPT2LMHeadModel, folder: Path) -> ModelSpec:
    return ModelSpec(open_checkpoint(str(checkpoints.save(model, folder))), slots=3)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return spec_of(checkpoints.gpt2(), tmp_path_factory.mktemp("plain"))


@compiled
@pytest.mark.parametrize(
    ("precision", "keys", "values"),
    [("bf16", UP, 1), ("bf16", 1, DOWN), ("nf4", 1, UP), ("dynamic-int8", DOWN, 1)],
)
def test_scaled_weights_give_the_same_logits(
    precision: str, keys: float, values: float, plain: ModelSpec, tmp_path: Path
) -> None:
    exact = loaders.load(precision, replace(plain, kv_dtype="fp32")).runner
    assert isinstance(exact, DecoderCPURunner)
    expected = exact.score(PROMPT)
    runner = loaders.load(precision, spec_of(scaled(keys, values), tmp_path / "scaled")).runner
    assert isinstance(runner, DecoderCPURunner)
    assert distance(runner.score(PROMPT), expected) < 0.05
    runner.prefill(1, PROMPT[:-1], "none")
    assert distance(runner.decode([1], PROMPT[-1:])[0], expected[-1]) < 0.05
    assert runner.pool.block_bytes == exact.pool.block_bytes
    assert runner.report()["kv_cache_dtype"].startswith("float32, since float16")


@compiled
def test_keys_and_values_in_range_are_kept_in_float16(plain: ModelSpec) -> None:
    runner = loaders.load("bf16", plain).runner
    assert isinstance(runner, DecoderCPURunner)
    runner.score(PROMPT)
    assert runner.report() == {"forward": "compiled", "kv_cache_dtype": "float16"}


@compiled
def test_a_sequence_that_widens_the_cache_changes_no_bit_of_the_others(tmp_path: Path) -> None:
    """One token's keys are beyond float16, the other tokens' are not."""
    model = checkpoints.gpt2()
    large, common = 7, [8, 9, 10, 11, 12, 13]
    with torch.no_grad():  # an embedding that only one token has, and a key that only looks at it
        model.transformer.wte.weight[:, 0], model.transformer.wpe.weight[:, 0] = 0, 0
        model.transformer.wte.weight[large, 0] = 8
        model.transformer.h[0].attn.c_attn.weight[0, WIDTH] = 2e4
        for block in model.transformer.h:
            block.attn.c_proj.weight[:, 0] = block.mlp.c_proj.weight[:, 0] = 0
            block.attn.c_attn.weight[0, :WIDTH] *= 1e-4
    spec = spec_of(model, tmp_path / "uneven")

    def run(mate: bool) -> tuple[list[Tensor], str]:
        runner = loaders.load("bf16", spec).runner
        assert isinstance(runner, DecoderCPURunner)
        runner.prefill(0, common[:3], "none")
        found = [runner.decode([0], common[3:4])]
        if mate:
            runner.prefill(1, [large, *common], "none")
            found.append(runner.decode([0, 1], [common[4], large])[:1])
        else:
            found.append(runner.decode([0], common[4:5]))
        found.append(runner.score(common))
        return found, runner.report()["kv_cache_dtype"]

    (alone, narrow), (beside, wide) = run(mate=False), run(mate=True)
    assert (narrow, wide.split(",")[0]) == ("float16", "float32")
    assert all(torch.equal(one, other) for one, other in zip(alone, beside, strict=True))


def test_a_model_whose_keys_overflow_float16_is_not_served_in_it(tmp_path: Path) -> None:
    model = checkpoints.llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight *= 2.0**17
            layer.self_attn.q_proj.weight /= 2.0**17
    spec = ModelSpec(open_checkpoint(str(checkpoints.save(model, tmp_path / "large"))), slots=2)
    with pytest.raises(CheckpointError, match=r"not numbers \(beyond the range of float16.*bf16"):
        loaders.load("fp16", spec)
    expected = checkpoints.llama()(torch.tensor([PROMPT])).logits[0]
    torch.testing.assert_close(
        loaders.load("fp32", spec).runner.score(PROMPT), expected, atol=1e-3, rtol=1e-3
    )


def test_a_static_cache_marks_overflow_as_nan() -> None:
    shape = Shape(layers=1, heads=1, width=2, dtype=torch.float16, device=torch.device("cpu"))
    cache = StaticCache(shape, slots=1, columns=4)
    cache.begin(torch.tensor([0]), 1, 2)
    keys, values = cache.put(
        0, torch.tensor([[[[-torch.inf, 1.0]], [[2.0, torch.inf]]]], dtype=torch.float16)
    )
    assert keys[0, 0, 0].isnan().tolist() == [True, False]
    assert values[0, 0, 0].isnan().tolist() == [False, True]
    keys, _ = cache.update(*torch.full((2, 1, 1, 1, 2), -torch.inf, dtype=torch.float16), 0)
    assert keys[0, 0, 0].isnan().all()
