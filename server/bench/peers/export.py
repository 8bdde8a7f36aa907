"""A checkpoint as NumPy arrays and JSON, which the peers' converters read without torch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loaders.base import Checkpoint, ModelSpec, ignore_progress
from loaders.checkpoint import load_tokenizer
from loaders.pretrained import load_pretrained
from server.bench.errors import BenchError

DESCRIPTION = "model.json"


def export(checkpoint: Checkpoint, folder: Path) -> Path:
    """Writes every weight as float32 ``NAME.npy``, and the configuration, tokens and merges as JSON.

    Raises:
        BenchError: not a GPT-2, the only architecture of the converters.
        CheckpointError: it has no usable tokenizer, or can't be loaded.
    """
    if checkpoint.architecture != "GPT2LMHeadModel":
        raise BenchError(f"peers are measured on GPT-2 checkpoints; this is a {checkpoint.architecture}")
    folder.mkdir(parents=True, exist_ok=True)
    model = load_pretrained(ModelSpec(checkpoint), ignore_progress, dtype=torch.float32)
    for name, tensor in model.transformer.named_parameters():
        np.save(folder / f"{name}.npy", tensor.detach().numpy())
    (folder / DESCRIPTION).write_text(json.dumps(_describe(checkpoint)))
    return folder


def _describe(checkpoint: Checkpoint) -> dict[str, Any]:
    config, tokenizer = checkpoint.config, load_tokenizer(checkpoint)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    known = {id_: token for token, id_ in tokenizer.get_vocab().items()}
    return {
        "name": checkpoint.model_id,
        "layers": config.n_layer,
        "heads": config.n_head,
        "width": config.n_embd,
        "inner": config.n_inner or 4 * config.n_embd,
        "context": config.n_positions,
        "epsilon": config.layer_norm_epsilon,
        "bos": config.bos_token_id,
        "eos": config.eos_token_id,
        # rows of the embedding beyond the tokenizer's vocabulary need a name, too
        "tokens": [known.get(id_, f"[unused{id_}]") for id_ in range(config.vocab_size)],
        "special": sorted(tokenizer.all_special_ids),
        "unused": sorted(set(range(config.vocab_size)) - known.keys()),
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
    }
