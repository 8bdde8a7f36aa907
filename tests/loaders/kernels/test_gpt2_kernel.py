"""The compiled forward pass of GPT-2 against ``transformers``', in every library that this CPU can run."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from loaders import kernels
from loaders.kernels import GPT2, KeyValues, Layer, Library, Norm, PackedMatrix

pytestmark = pytest.mark.skipif(kernels.get() is None, reason=str(kernels.find()))

HEADS, LAYERS, CONTEXT, VOCABULARY, SLOTS = 4, 2, 40, 133, 3


def reference(dim: int) -> GPT2LMHeadModel:
    config = GPT2Config(
        n_embd=HEADS * dim,
        n_head=HEADS,
        n_layer=LAYERS,
        n_positions=CONTEXT,
        vocab_size=VOCABULARY,
        initializer_range=0.2,
    )
    model = GPT2LMHeadModel(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or ".ln_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False)


def packed(library: Library, model: Any) -> GPT2:
    def matrix(conv: Any) -> PackedMatrix:
        return PackedMatrix(library, "float32", conv.weight.T.contiguous(), bias=conv.bias)

    def norm(layer: Any) -> Norm:
        return Norm(layer.weight, layer.bias)

    body = model.transformer
    layers = [
        Layer(
            norm(block.ln_1),
            matrix(block.attn.c_attn),
            matrix(block.attn.c_proj),
            norm(block.ln_2),
            matrix(block.mlp.c_fc),
            matrix(block.mlp.c_proj),
        )
        for block in body.h
    ]
    head = PackedMatrix(library, "float32", model.lm_head.weight)
    return GPT2(
        library,
        HEADS,
        model.config.layer_norm_epsilon,
        body.wte.weight,
        body.wpe.weight,
        layers,
        norm(body.ln_f),
        head,
    )


def empty_cache(dim: int) -> KeyValues:
    shape = (SLOTS, HEADS, CONTEXT, dim)
    return KeyValues([(torch.full(shape, torch.nan), torch.full(shape, torch.nan)) for _ in range(LAYERS)])


def ids_of(count: int) -> list[int]:
    found: list[int] = torch.randint(VOCABULARY, (count,)).tolist()
    return found


def expected(model: GPT2LMHeadModel, ids: list[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([ids])).logits[0]
    return logits


@pytest.mark.parametrize("dim", [8, 40, 64, 96])
def test_sequences_side_by_side(library: Library, dim: int) -> None:
    """Two prompts of different lengths in one call, then one more token of each, in the other order."""
    model = reference(dim)
    compute, cache = packed(library, model), empty_cache(dim)
    one, two = ids_of(CONTEXT), ids_of(7)
    first = compute(cache, [2] * 39 + [0] * 6, [*range(39), *range(6)], one[:39] + two[:6], 45)
    torch.testing.assert_close(first[:39], expected(model, one)[:39], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first[39:], expected(model, two)[:6], rtol=1e-4, atol=1e-4)
    after = compute(cache, [0, 2], [6, 39], [two[6], one[39]], 2)
    torch.testing.assert_close(after[0], expected(model, two)[6], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after[1], expected(model, one)[39], rtol=1e-4, atol=1e-4)


def test_only_the_wanted_rows_get_logits(library: Library) -> None:
    compute, ids = packed(library, reference(8)), ids_of(9)
    whole = compute(empty_cache(8), [0] * 9, range(9), ids, 9)
    assert torch.equal(compute(empty_cache(8), [0] * 9, range(9), ids, 2), whole[7:])
    assert compute(empty_cache(8), [0] * 9, range(9), ids, 0).shape == (0, VOCABULARY)


def test_any_number_of_threads_gives_the_same_bits(library: Library) -> None:
    compute, ids = packed(library, reference(64)), ids_of(30)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(compute(empty_cache(64), [1] * 30, range(30), ids, 30))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_large_scores_do_not_overflow(library: Library) -> None:
    model = reference(8)
    for block in model.transformer.h:
        block.attn.c_attn.weight.mul_(1e4)
    compute = packed(library, model)
    assert compute(empty_cache(8), [0] * 20, range(20), ids_of(20), 20).isfinite().all()


@pytest.mark.parametrize(
    ("ids", "positions"), [([VOCABULARY], [0]), ([-1], [0]), ([0], [CONTEXT]), ([0], [-1])]
)
def test_ids_and_positions_without_an_embedding_are_refused(
    library: Library, ids: list[int], positions: list[int]
) -> None:
    with pytest.raises(IndexError):
        packed(library, reference(8))(empty_cache(8), [0], positions, ids, 1)
