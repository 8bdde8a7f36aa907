"""Tokenizers with and without a bound on the length of a token."""

import inspect
import pydoc
import random
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

import loaders.checkpoint
from server.service.text.codec import TextCodec
from server.service.text.token_length import token_length
from tests.checkpoints import byte_tokenizer

UNKNOWN = "<unk>"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = [*"▁abcdefghijklmnopqrstuvwxyz", "th", "the", "▁the", "é"]
MERGES = [("t", "h"), ("th", "e"), ("▁", "the")]
ALPHABET = "the cat  \n\té漢🤗\u0301 a\u0327\x00\u200bﬁ①Ａ"


def bundled() -> Any:
    return loaders.checkpoint.load_tokenizer(loaders.checkpoint.open_checkpoint("bundled"))


def sentencepiece(**options: Any) -> PreTrainedTokenizerFast:
    """A BPE like Llama's first: spaces are ▁, unknown characters are bytes."""
    vocabulary = {token: i for i, token in enumerate([UNKNOWN, *BYTES, *PIECES])}
    known = {"unk_token": UNKNOWN, "byte_fallback": True, "fuse_unk": True, **options}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES, **known))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.ByteFallback()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=UNKNOWN)


def composing() -> PreTrainedTokenizerFast:
    found = byte_tokenizer()
    found.backend_tokenizer.normalizer = normalizers.NFKC()
    return found


def each_unknown_by_itself() -> PreTrainedTokenizerFast:
    return sentencepiece(byte_fallback=False, fuse_unk=False)


@pytest.mark.parametrize(
    ("make", "most", "in_bytes"),
    [
        (byte_tokenizer, len("<|endoftext|>"), True),
        (bundled, 33, True),
        (sentencepiece, len("<0x00>"), False),
        (composing, 4 * len("<|endoftext|>"), False),
        (each_unknown_by_itself, len("<0x00>"), False),
    ],
)
def test_the_lower_bound_of_tokens_holds_for_every_text(
    make: Callable[[], Any], most: int, in_bytes: bool
) -> None:
    tokenizer, drawn = make(), random.Random(0)
    length = token_length(tokenizer)
    assert length is not None
    assert (length.most, length.in_bytes) == (most, in_bytes)
    for size in [1, 5, 40, 400] * 10:
        text = "".join(drawn.choices(ALPHABET, k=size))
        assert 1 <= length.fewest(text) <= len(TextCodec(tokenizer).encode(text))
    assert length.fewest("x" * 10 * most) == 10
    assert length.fewest("é" * 10 * most) == (20 if in_bytes else 10)


def changed(change: Callable[[Tokenizer], None]) -> PreTrainedTokenizerFast:
    found = byte_tokenizer()
    change(found.backend_tokenizer)
    return found


def word_level() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({UNKNOWN: 0, "a": 1}, unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token=UNKNOWN)


@pytest.mark.parametrize(
    "make",
    [
        word_level,
        lambda: sentencepiece(byte_fallback=False),  # a run of unknown characters is one token
        lambda: sentencepiece(byte_fallback=False, fuse_unk=False, unk_token=None),  # … is no token
        lambda: changed(lambda t: setattr(t, "normalizer", normalizers.Strip())),
        lambda: changed(lambda t: setattr(t, "normalizer", normalizers.Replace(Regex(" +"), " "))),
        lambda: changed(lambda t: setattr(t, "normalizer", normalizers.Replace("x", ""))),
        lambda: changed(lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Whitespace())),
        lambda: changed(lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Split(" ", "removed"))),
        lambda: None,
    ],
)
def test_tokenizers_without_a_bound(make: Callable[[], Any]) -> None:
    assert token_length(make()) is None


def test_bytes_without_a_token() -> None:
    alphabet = [letter for byte, letter in bytes_to_unicode().items() if byte not in (0x04, 0xF1, 0xFF)]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    codec = TextCodec(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert codec.token_length is not None
    assert (codec.token_length.most, sorted(codec.token_length.dropped)) == (1, [0x04, 0xF1])
    for text in ("\x04" * 9000, "\U00040000" * 50, "a\x04b\U00040000" * 50):
        assert codec.token_length.fewest(text) == len(codec.encode(text))
        assert codec.token_length.end(text, 1) == text


def test_a_token_that_absorbs_adjacent_spaces() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])
    length = token_length(tokenizer)
    assert length is not None
    text = " " * 5000 + "<mask>"
    assert TextCodec(tokenizer).encode(text) == [tokenizer.convert_tokens_to_ids("<mask>")]
    assert length.fewest(text) == 0
    assert length.end(text, 1) == text
    assert length.fewest(" " * 5000) > 100


@pytest.mark.parametrize("make", [byte_tokenizer, bundled, sentencepiece])
def test_the_last_tokens_are_those_of_the_whole_text(make: Callable[[], Any]) -> None:
    tokenizer = make()
    codec, length = TextCodec(tokenizer), token_length(tokenizer)
    assert length is not None
    text = (inspect.getsource(pydoc) * 2)[:40_000]
    for cut in range(0, 400, 23):
        whole = text[: len(text) - cut]
        end = length.end(whole, 50)
        assert len(end) < 10_000
        assert codec.encode(end)[-50:] == codec.encode(whole)[-50:]
    assert length.end(text[:3000], 50) == text[:3000]
    assert len(length.end("x" * 40_000, 50)) < 10_000
