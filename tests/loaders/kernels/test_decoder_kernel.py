"""The compiled forward pass against ``transformers``', in every library that this CPU can run."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from loaders import kernels
from loaders.architectures import architecture_of
from loaders.base import ignore_progress
from loaders.kernels import Decoder, KVBlocks, Library
from loaders.layers.native_linear import adopt
from loaders.runners.packing import pack
from tests import decoders
from tests.decoders import CONTEXT, VOCABULARY

pytestmark = pytest.mark.skipif(kernels.get() is None, reason=str(kernels.find()))

TABLES = np.array([[3, 1, 5, 0], [2, 7, 4, 6], [8, 9, 10, 11]], dtype=np.int32)
IDS = torch.randint(2, VOCABULARY, (100,), generator=torch.Generator().manual_seed(0)).tolist()


def packed(library: Library, model: Any) -> Decoder:
    """On the compiled kernels from now on, the model's own forward pass too."""
    adopt(model, ignore_progress)
    return pack(model, architecture_of(model.config), CONTEXT, library)


class Cache(KVBlocks):
    """Blocks whose memory is NaN until it is written."""

    def __init__(self, model: Any) -> None:
        architecture = architecture_of(model.config)
        shape = architecture.shape
        elements = len(architecture.windows) * 2 * shape.kv_heads * 32 * shape.head_dim
        self.memory = torch.full((12, elements), torch.nan)
        super().__init__(self.memory.data_ptr(), 4 * elements, TABLES, half=False)


def expected(model: Any, ids: list[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([ids])).logits[0]
    return logits


def error(found: Tensor, exact: Tensor) -> float:
    """The largest, relative to the range of the logits."""
    return float((found - exact).abs().max() / (exact.max() - exact.min()))


@pytest.mark.parametrize("name", decoders.CONFIGS)
def test_logits_are_those_of_transformers(name: str, library: Library) -> None:
    """In one pass, and in chunks beside another sequence: bit for bit the same."""
    model = decoders.make(name)
    exact, other = expected(model, IDS), expected(model, IDS[40:])
    compute, cache = packed(library, model), Cache(model)
    whole = compute(cache, [0] * 100, range(100), IDS, 100)
    assert error(whole, exact) < 1e-4
    first = compute(cache, [1] * 63 + [2] * 33, [*range(63), *range(33)], IDS[:63] + IDS[40:73], 96)
    assert torch.equal(first[:63], whole[:63])
    assert error(first[63:], other[:33]) < 1e-4
    middle = compute(cache, [1] * 36, range(63, 99), IDS[63:99], 36)
    last = compute(cache, [2, 1], [33, 99], [IDS[73], IDS[99]], 2)
    assert torch.equal(torch.cat([middle, last[1:]]), whole[63:])
    assert error(last[:1], other[33:34]) < 1e-4


@pytest.mark.parametrize("dim", [8, 40, 64, 96])
def test_any_head_dimension(dim: int, library: Library) -> None:
    model = decoders.make("gpt2", n_embd=4 * dim)
    exact = expected(model, IDS)
    compute, cache = packed(library, model), Cache(model)
    assert error(compute(cache, [0] * 100, range(100), IDS, 100), exact) < 1e-4


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "silu", "relu"])
def test_activations_to_float32s_precision(activation: str, library: Library) -> None:
    """At arguments from -20 to 20, through the down projection."""
    model = decoders.make("gpt2", activation_function=activation, n_layer=1)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.mul_(3)
    exact = expected(model.double(), IDS).float()
    compute, cache = packed(library, model.float()), Cache(model)
    assert error(compute(cache, [0] * 100, range(100), IDS, 100), exact) < 1e-5


def test_only_the_wanted_rows_get_logits(library: Library) -> None:
    model = decoders.make("llama")
    compute = packed(library, model)
    whole = compute(Cache(model), [0] * 9, range(9), IDS[:9], 9)
    assert torch.equal(compute(Cache(model), [0] * 9, range(9), IDS[:9], 2), whole[7:])
    assert compute(Cache(model), [0] * 9, range(9), IDS[:9], 0).shape == (0, VOCABULARY)


def test_any_number_of_threads_gives_the_same_bits(library: Library) -> None:
    model = decoders.make("qwen3")
    compute, found, threads = packed(library, model), [], torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(compute(Cache(model), [1] * 40, range(40), IDS[:40], 40))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_shared_block_serves_two_sequences(library: Library) -> None:
    """The second table begins with the first one's full blocks; its rows begin behind them."""
    model = decoders.make("mistral")
    compute, cache = packed(library, model), Cache(model)
    whole = compute(cache, [0] * 100, range(100), IDS, 100)
    tables = np.array([TABLES[0], [*TABLES[0][:2], 10, 11]], dtype=np.int32)
    shared = KVBlocks(cache.address, cache.block_bytes, tables, half=False)
    again = compute(shared, [1] * 36, range(64, 100), IDS[64:], 36)
    assert torch.equal(again, whole[64:])


def test_large_scores_do_not_overflow(library: Library) -> None:
    model = decoders.make("gpt2")
    for block in model.transformer.h:
        block.attn.c_attn.weight.mul_(1e4)
    compute = packed(library, model)
    assert compute(Cache(model), [0] * 20, range(20), IDS[:20], 20).isfinite().all()


@pytest.mark.parametrize(
    ("slot", "position", "id_"),
    [(0, 0, VOCABULARY), (0, 0, -1), (0, CONTEXT, 0), (0, -1, 0), (3, 0, 0), (-1, 0, 0)],
)
def test_what_has_no_embedding_or_block_is_refused(
    slot: int, position: int, id_: int, library: Library
) -> None:
    model = decoders.make("llama")
    with pytest.raises(IndexError):
        packed(library, model)(Cache(model), [slot], [position], [id_], 1)
