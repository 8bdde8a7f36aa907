"""Incremental decoding equals decoding all ids at once, for tokenizers of every kind."""

from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from server.service.text.codec import TextCodec
from server.service.text.detokenizer import CleanUp
from tests.vocabularies import KINDS

kinds = pytest.mark.parametrize("kind", KINDS)


@cache
def made(kind: str) -> tuple[Any, TextCodec]:
    tokenizer = KINDS[kind]()
    return tokenizer, TextCodec(tokenizer)


def ids_of(tokenizer: Any, tokens: list[str]) -> list[int]:
    ids: list[int] = tokenizer.convert_tokens_to_ids(tokens)
    return ids


def streamed(codec: TextCodec, ids: list[int], prompt: list[int]) -> list[str]:
    decoder = codec.incremental(prompt)
    return [*(decoder.push(id_) for id_ in ids), decoder.finish()]


@kinds
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_random_ids(kind: str, data: st.DataObject) -> None:
    tokenizer, codec = made(kind)
    size = len(tokenizer)
    # some beyond the vocabulary, as a model's rows may be; slow tokenizers decode them as <unk>
    any_id = (
        st.integers(0, size + (2 if tokenizer.is_fast else -1))
        | st.sampled_from(tokenizer.all_special_ids)
        | st.integers(0, 20)
    )
    ids = data.draw(st.lists(any_id, max_size=15))
    prompt = data.draw(st.sampled_from([[], [1], codec.encode("a"), [*codec.encode("it a"), 2]]))
    whole = tokenizer.decode([*prompt, *ids], skip_special_tokens=True)
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    assert before + "".join(streamed(codec, ids, prompt)) == whole
    shares = codec.shares(prompt, ids)
    assert before + "".join(shares) == whole
    assert not any(share for share, id_ in zip(shares, ids, strict=True) if codec.token(id_).hidden)
    assert codec.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "cleaned" not in kind and kind != "ctrl"])
@given(st.text(st.sampled_from("ab is 🤗é.,'nt"), max_size=20))
@settings(max_examples=25, deadline=None)
def test_the_tokens_bytes_and_offsets_are_those_of_the_text(kind: str, text: str) -> None:
    codec = made(kind)[1]
    ids = codec.encode(f"a{text}")
    prompt = codec.encode("a")
    tokens = [codec.token(id_) for id_ in ids]
    shown = [token for token in tokens if not token.hidden]
    whole = "".join(streamed(codec, ids, prompt))
    assert b"".join(token.data for token in shown).decode() == whole
    offsets = codec.offsets(prompt)
    found = [offsets.add(token.id) for token in shown]
    before = 0
    for token, offset in zip(shown, found, strict=True):
        assert offset == len(whole.encode()[:before].decode(errors="ignore"))
        before += len(token.data)


@given(st.lists(st.text(st.sampled_from(" .,'nsmtverx"), max_size=3), max_size=8))
@example(["it", " '", " s"])
@example(["  n", " '", " t"])
@settings(max_examples=200, deadline=None)
def test_spaces_are_cleaned_up_alike_in_pieces_and_in_one(pieces: list[str]) -> None:
    clean = made("wordpiece-cleaned")[0].clean_up_tokenization
    cleaner = CleanUp(clean)
    given = [cleaner.push(piece, final=False) for piece in pieces]
    assert "".join([*given, cleaner.push("", final=True)]) == clean("".join(pieces))


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [("byte-level", [*"ðŁ¤Ĺx"]), ("llama", ["<0xF0>", "<0x9F>", "<0xA4>", "<0x97>", "x"])],
)
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_prompt_that_ends_amid_a_character(kind: str, tokens: list[str], cut: int) -> None:
    tokenizer, codec = made(kind)
    ids = [*codec.encode("a"), *ids_of(tokenizer, tokens)]
    cut += len(ids) - len(tokens)
    assert "".join(streamed(codec, ids[cut:], ids[:cut])) == "🤗x"
    assert "".join(codec.shares(ids[:cut], ids[cut:])) == "🤗x"
    offsets = codec.offsets(ids[:cut])
    assert [offsets.add(id_) for id_ in ids[cut:]][-1] == 1


def test_whole_characters_of_a_long_run_of_bytes_are_not_held_back_for_ever() -> None:
    tokenizer, codec = made("llama")
    text = "አማርኛ" * 10
    ids = ids_of(tokenizer, [f"<0x{byte:02X}>" for byte in text.encode()])
    decoder = codec.incremental(codec.encode("a"))
    given = [decoder.push(id_) for id_ in ids]
    assert text.startswith("".join(given))
    assert len("".join(given)) > len(text) - 8
    assert "".join([*given, decoder.finish()]) == text
