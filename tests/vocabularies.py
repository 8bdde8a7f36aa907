"""Small tokenizers of every kind that causal language models use."""

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import CTRLTokenizer, PreTrainedTokenizerFast

from tests.checkpoints import byte_tokenizer

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_end|>"]
WORDS = ["▁Hello", "▁world", "▁it", "▁", "▁▁", "'", "s", "▁s", "ing", ".", "▁.", ",", "🤗", "é", "\ufffd"]
_LETTERS = list("abcdefghijklmnopqrstuvwxyz")
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _wrapped(tokenizer: Tokenizer, clean_up: bool = False) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=clean_up,
    )


def llama() -> PreTrainedTokenizerFast:
    """Llama 2's kind: SentencePiece's BPE with byte fallback; a first space is added and stripped."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *_BYTES, *WORDS, *_LETTERS])}
    bpe = models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _wrapped(tokenizer)


def gemma() -> PreTrainedTokenizerFast:
    """Byte fallback without a space before the text."""
    tokenizer = llama().backend_tokenizer
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _wrapped(tokenizer)


def unigram(scheme: str, clean_up: bool = False) -> PreTrainedTokenizerFast:
    """SentencePiece's Unigram; ``scheme``: the words that get a space before them."""
    pieces = [*SPECIAL, *WORDS, *_LETTERS]
    scores = [(piece, -float(i + 1)) for i, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(scores, 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme)
    tokenizer.decoder = decoders.Metaspace("▁", scheme)
    return _wrapped(tokenizer, clean_up)


def wordpiece(clean_up: bool) -> PreTrainedTokenizerFast:
    """BERT's kind; its decoder cleans up each word or, with ``clean_up``, ``transformers`` the whole text."""
    words = [word.removeprefix("▁") for word in WORDS if word.strip("▁")]
    parts = ["##ing", "##s", "##.", "ve", "re", "?", "ab"]
    pieces = dict.fromkeys([*SPECIAL, *words, *parts, *_LETTERS])
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=not clean_up)
    return _wrapped(tokenizer, clean_up)


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's kind, with special tokens that have no role."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<think>", " é!"])
    return tokenizer


def ctrl() -> Any:
    """CTRL's kind, a slow tokenizer: a token that is not the end of a word ends with ``@@``."""
    tokens = ["<unk>", *_LETTERS, *(f"{letter}@@" for letter in _LETTERS), "it", ".", ",", "'", "é"]
    with TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary.write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        merges.write_text("#version: 0.2\ni t</w> 1\n")
        return CTRLTokenizer(str(vocabulary), str(merges))


KINDS: dict[str, Callable[[], Any]] = {
    "byte-level": byte_level,
    "llama": llama,
    "gemma": gemma,
    "unigram-always": lambda: unigram("always"),
    "unigram-first": lambda: unigram("first"),
    "unigram-never": lambda: unigram("never"),
    "unigram-cleaned": lambda: unigram("always", clean_up=True),
    "wordpiece": lambda: wordpiece(clean_up=False),
    "wordpiece-cleaned": lambda: wordpiece(clean_up=True),
    "ctrl": ctrl,
}
