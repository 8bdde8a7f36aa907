#!/usr/bin/env python3
"""Which precisions of which models fit a card beside the keys and values of some sequences; on paper.

    .venv/bin/python scripts/gpu_partition.py --out docs/results/gpu-partition

Nothing is estimated: models are built on the meta device, and the bytes of every tensor are counted as
``loaders/footprint.py`` counts those of a loaded model: weights, biases, norms, embeddings, and the quantized
layers' codes, scales and tables as bitsandbytes makes them. A sequence takes a slot of ``StaticCache``; one
slot more is the dummy of padding rows. Of a card 0.9 are used, as the server does; what steps work in
(activations, captured graphs, the CUDA context) is in the rest, and can only be measured on a card.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from model_shapes import SHAPES
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from loaders.base import DTYPES
from loaders.config_check import meta_model_of
from loaders.cuda.buckets import columns_for
from loaders.cuda.memory import _MARGIN as MARGIN
from loaders.cuda.static_cache import Shape, ShapeProbe
from loaders.precisions.bnb import BLOCK
from server.tables import markdown_table

GIGA = 1e9
CARDS = {"80 GB": 80e9, "40 GB": 40e9, "20 GB": 20e9, "10 GB": 10e9}
"""A whole card, and the memory of its MIG slices 3g.40gb, 2g.20gb and 1g.10gb."""
PRECISIONS = ("fp32", "bf16", "fp16", "int8", "nf4", "nf4 double")
SETS = tuple(names for size in (4, 3, 2) for names in combinations(("fp32", "bf16", "int8", "nf4"), size))
_FLOAT, _CODES = 4, 16  # bytes of a scale; entries of a four-bit table
_NESTED_BLOCK, _NESTED_CODES = 256, 256  # of the scales' own quantization


@dataclass(frozen=True)
class Counted:
    """Bytes of one precision of a model on a GPU."""

    weights: int
    slot: int
    """Keys and values of one sequence of the given length."""

    def sequences(self, room: float) -> int:
        """Sequences that fit beside the weights; negative where the weights alone don't."""
        return int((room * MARGIN - self.weights) // self.slot) - 1

    def total(self, sequences: int) -> int:
        return self.weights + (sequences + 1) * self.slot


def weights_bytes(model: nn.Module, precision: str, rest: torch.dtype) -> int:
    """Bytes of all tensors, tied ones once.

    Args:
        rest: the type of what is not quantized.
    """
    quantized = dict(_quantized_layers(model)) if precision not in DTYPES else {}
    codes = {id(layer.weight) for layer in quantized.values()}
    kept = sum(one.numel() * rest.itemsize for one in model.parameters() if id(one) not in codes)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    return kept + buffers + sum(_layer_bytes(layer, precision) for layer in quantized.values())


def _quantized_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Every linear layer but the output head."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            yield name, module


def _layer_bytes(layer: Any, precision: str) -> int:
    """Codes and quantization state of a layer as bitsandbytes makes them."""
    weights, outputs = layer.weight.numel(), layer.nf if isinstance(layer, Conv1D) else layer.out_features
    if precision == "int8":
        return int(weights + outputs * _FLOAT)
    blocks = -(-weights // BLOCK)
    state = _CODES * _FLOAT
    if precision == "nf4 double":  # a byte a scale, an outer scale for 256 of them, a table and an offset
        state += blocks + -(-blocks // _NESTED_BLOCK) * _FLOAT + _NESTED_CODES * _FLOAT + _FLOAT
    else:
        state += blocks * _FLOAT
    return int(-(-weights // 2) + state)


def rest_of(precision: str) -> torch.dtype:
    """The type of what is not quantized, as ``loaders.precisions.bnb.rest_dtype`` has it on a GPU."""
    if precision in DTYPES:
        return DTYPES[precision]
    return torch.float16 if precision == "int8" else torch.bfloat16


def token_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Keys and values of one token, from the tensors that the model's own forward pass hands to its cache."""
    probe = ShapeProbe()
    ids = torch.ones((1, 1), dtype=torch.int64, device="meta")
    mask = torch.zeros((1, 1, 1, 1), device="meta")
    with torch.device("meta"):
        model(ids, past_key_values=probe, attention_mask=mask, position_ids=ids, use_cache=True)
    seen = probe.shape()
    return Shape(seen.layers, seen.heads, seen.width, dtype, seen.device).token_bytes


def counted(config: PreTrainedConfig, tokens: int) -> dict[str, Counted]:
    model = meta_model_of(config).eval()
    columns = columns_for(min(tokens, config.max_position_embeddings))
    found = {}
    for precision in PRECISIONS:
        rest = rest_of(precision)
        slot = columns * token_bytes(model, rest)
        found[precision] = Counted(weights_bytes(model, precision, rest), slot)
    return found


def fitting_sets(precisions: dict[str, Counted], room: float, sequences: int) -> list[tuple[str, ...]]:
    """The largest sets of precisions that fit together, each with its own cache."""
    fit = [
        names for names in SETS if sum(precisions[name].total(sequences) for name in names) <= room * MARGIN
    ]
    return [names for names in fit if not any(set(names) < set(other) for other in fit)]


def tables(found: dict[str, dict[str, Counted]], tokens: int, sequences: int) -> str:
    heads = ["model", "precision", "weights, GB", "a sequence, MB", *(f"sequences, {card}" for card in CARDS)]
    rows, together = [heads], [["model", *(f"together on {card}" for card in CARDS)]]
    for model, precisions in found.items():
        for name, one in precisions.items():
            room = (one.sequences(size) for size in CARDS.values())
            shown = [f"{count}" if count > 0 else "–" for count in room]
            rows.append([model, name, f"{one.weights / GIGA:.3f}", f"{one.slot / 1e6:.1f}", *shown])
        sets = (fitting_sets(precisions, size, sequences) for size in CARDS.values())
        together.append([model, *("; ".join(" + ".join(names) for names in some) or "–" for some in sets)])
    return (
        f"# What fits a card\n\nCounted by `scripts/gpu_partition.py` from tensors on the meta device. "
        f"Sequences of {tokens} tokens (GPT-2: 1,024), of a card 0.9 used.\n\n## One precision by itself\n\n"
        f"{markdown_table(rows)}\n\n## Precisions together, each with {sequences} sequences\n\n"
        f"Of fp32, bf16, int8 and nf4 the largest sets; –: no two fit.\n\n{markdown_table(together)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=2048, help="of a sequence")
    parser.add_argument("--sequences", type=int, default=16, help="of each precision, where several share")
    parser.add_argument("--out", type=Path, required=True, help="without suffix: .md and .json are added")
    options = parser.parse_args()
    found = {name: counted(config, options.tokens) for name, (config, _) in SHAPES.items()}
    text = tables(found, options.tokens, options.sequences)
    options.out.with_suffix(".md").write_text(text)
    data = {
        "tokens": options.tokens,
        "margin": MARGIN,
        "cards": CARDS,
        "models": {
            model: {
                name: {
                    **asdict(one),
                    "sequences": {card: one.sequences(size) for card, size in CARDS.items()},
                }
                for name, one in precisions.items()
            }
            for model, precisions in found.items()
        },
    }
    options.out.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
