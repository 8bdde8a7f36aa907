"""Generates small real checkpoints: a GPT-2, a Llama with grouped-query attention."""

import random
import string
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Regex, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from server.bench.gpu.models import END, byte_level

EXPLOSIVE = "x" * 60 + "z"
VOCABULARY = 320  # 256 bytes, the end token, some merges; the rest of the rows are never produced by text


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE like GPT-2's, with a few merges so that tokens span characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("a", "n"), ("Ġ", "a"), ("e", "r")]
    tokens = [END, *alphabet, *("".join(merge) for merge in merges)]
    return byte_level(tokens, merges)


def exploding_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose pattern takes exponential time on ``EXPLOSIVE``, until the Rust library panics."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("(x+x+)+y"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def gpt2(context: int = 256, seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=context, n_embd=64, n_layer=2, n_head=2,
            initializer_range=0.2, bos_token_id=0, eos_token_id=0,
        )
    ).eval()  # fmt: skip


def llama(context: int = 256, seed: int = 0) -> LlamaForCausalLM:
    """Two key-value heads for four query heads; head untied."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=context,
            initializer_range=0.2, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
        )
    ).eval()  # fmt: skip


def scripted(script: Sequence[int], prompt_tokens: int, vocabulary: int = VOCABULARY) -> GPT2LMHeadModel:
    """A GPT-2 that generates ``script`` after any prompt of so many tokens, by position alone."""
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=256, n_embd=256, n_layer=1, n_head=4,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)
        model.transformer.wpe.weight.copy_(torch.eye(256))
        for at, id_ in enumerate(script):
            model.lm_head.weight[id_, prompt_tokens - 1 + at] = 1.0
    return model


def calibration_text(folder: Path) -> Path:
    """A text of a few thousand tokens beside a checkpoint, in which every printable character is usual."""
    path, chosen = folder / "calibration.txt", random.Random(0)
    words = ("".join(chosen.choices(string.digits + string.ascii_letters + string.punctuation, k=6))
             for _ in range(1500))  # fmt: skip
    path.write_text(" ".join(words))
    return path


def save(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    """Writes a checkpoint in the hub's format: config, tokenizer, safetensors."""
    model.save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return folder
