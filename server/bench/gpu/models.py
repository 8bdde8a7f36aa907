"""Full-size models with random weights: real sizes and speeds, meaningless text."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as kinds
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

END = "<|endoftext|>"
_TOKENIZER_FILES = ("tokenizer*.json", "vocab.json", "merges.txt", "special_tokens_map.json")


@dataclass(frozen=True)
class Shape:
    """A GPT-2 of some size."""

    name: str
    width: int
    layers: int
    heads: int
    vocabulary: int = 50257
    context: int = 1024
    dtype: torch.dtype = torch.float32
    """Of the checkpoint; bfloat16 halves the file of the large one."""


GPT2 = Shape("gpt2", 768, 12, 12)
GPT2_XL = Shape("gpt2-xl", 1600, 48, 25, dtype=torch.bfloat16)
TINY, TINY_XL = (Shape(name, 64, layers, 2, 320, 256) for name, layers in (("tiny", 2), ("tiny-xl", 3)))
"""For a rehearsal without a GPU."""


def make(shape: Shape, folder: Path, device: str, tokenizer: Path | None) -> Path:
    """Writes a checkpoint with random weights, generated on the device, and a tokenizer.

    Args:
        tokenizer: folder with one of that vocabulary; ``stand_in`` if None.
    """
    torch.manual_seed(0)
    end = shape.vocabulary - 1
    config = GPT2Config(
        vocab_size=shape.vocabulary, n_positions=shape.context, n_embd=shape.width, n_layer=shape.layers,
        n_head=shape.heads, bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    with torch.device(device):
        model: Any = GPT2LMHeadModel(config)
    model.to(shape.dtype).save_pretrained(folder)
    del model
    if tokenizer is None:
        stand_in(shape.vocabulary).save_pretrained(folder)
    else:
        for pattern in _TOKENIZER_FILES:
            for file in tokenizer.glob(pattern):
                shutil.copy(file, folder)
    return folder


def stand_in(vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of that many tokens: 256 bytes, unreachable letters, and the end.

    So every token that a model with random weights generates has a text.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = ("".join(four) for four in product(ascii_lowercase, repeat=4))
    tokens = [*alphabet, *islice(letters, vocabulary - len(alphabet) - 1), END]
    return byte_level(tokens)


def byte_level(tokens: Sequence[str], merges: Sequence[tuple[str, str]] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; a token's id is its index."""
    bpe = kinds.BPE(vocab={token: id_ for id_, token in enumerate(tokens)}, merges=list(merges))
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        clean_up_tokenization_spaces=False,
    )
