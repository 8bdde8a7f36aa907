#!/usr/bin/env python3
"""Writes a checkpoint of a known model's shape with random weights: right bytes and speed, meaningless text.

    .venv/bin/python scripts/random_checkpoint.py qwen2.5-0.5b FOLDER

For `bitdial bench --model FOLDER` where the real weights are not at hand. The tokenizer is a stand-in of the
same vocabulary.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, Qwen2Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from server.bench.gpu.models import stand_in

SHAPES: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(),
    "smollm2-135m": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    ),
    "qwen2.5-0.5b": Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=32768, rms_norm_eps=1e-6,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
}  # fmt: skip


def make(config: PreTrainedConfig, folder: Path, seed: int = 0) -> Path:
    """Writes float32 weights, initialized as ``transformers`` does, and the tokenizer."""
    end = config.vocab_size - 1
    config.bos_token_id = config.eos_token_id = end
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    stand_in(config.vocab_size).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    chosen = parser.parse_args()
    make(SHAPES[chosen.shape], chosen.folder)


if __name__ == "__main__":
    main()
