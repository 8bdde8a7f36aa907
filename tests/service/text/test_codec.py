from collections.abc import Sequence

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from server.service.text.codec import TextCodec
from server.service.text.detokenizer import Detokenizer
from server.service.text.vocabulary import VocabularyToken
from tests.checkpoints import byte_tokenizer

CODEC = TextCodec(byte_tokenizer())


def stream(text: str, stop: tuple[str, ...] = (), prompt: str = "x") -> tuple[list[str], bool]:
    decoder = CODEC.incremental(CODEC.encode(prompt), stop)
    pieces = []
    for id_ in CODEC.encode(text):
        pieces.append(decoder.push(id_))
        if decoder.stopped:
            return pieces, True
    pieces.append(decoder.finish())
    return pieces, decoder.stopped


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
@settings(max_examples=200, deadline=None)
def test_the_pieces_join_to_the_text(text: str) -> None:
    assume("<|endoftext|>" not in text)  # a special token
    pieces, _ = stream(text)
    assert "".join(pieces) == text


@given(
    st.text(st.sampled_from("ab é😀"), max_size=30),
    st.lists(st.text("ab é", min_size=1, max_size=4), max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_a_stop_string_never_leaks_however_it_is_split(text: str, stops: list[str]) -> None:
    pieces, stopped = stream(text, tuple(stops))
    released = "".join(pieces)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert stopped == bool(ends)
    assert text.startswith(released)
    assert not any(stop in released for stop in stops)
    if not stopped:
        assert released == text


def test_an_unfinished_character_is_held_back() -> None:
    decoder = CODEC.incremental(CODEC.encode("x"))
    pieces = [decoder.push(id_) for id_ in CODEC.encode("😀")]
    assert pieces == ["", "", "", "😀"]


def test_a_character_that_never_ends_comes_out_as_replacements_at_the_end() -> None:
    decoder = CODEC.incremental(CODEC.encode("x"))
    assert decoder.push(CODEC.encode("😀")[0]) == ""
    assert set(decoder.finish()) == {"\ufffd"}


def test_special_tokens_leave_no_text() -> None:
    decoder = CODEC.incremental(CODEC.encode("x"))
    assert CODEC.is_special(0)
    assert decoder.push(0) == ""
    assert CODEC.token_text(0) == "<|endoftext|>"


class Bytes:
    """Replaces a vocabulary: tokens of arbitrary bytes, ids are list indices."""

    def __init__(self, tokens: list[bytes]) -> None:
        self.tokens = tokens

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.tokens[id_] for id_ in ids).decode(errors="replace")

    def __getitem__(self, id_: int) -> VocabularyToken:
        return VocabularyToken(id_, self.decode([id_]), self.tokens[id_])


CROSSING = [b"\xe4\xb8", b"\xad\xe4", b"\xb8\xad\xe4", b"\xb8\xad\xe4", b"\xb8\xad\xe4", b"\xb8\xad"]


@given(st.lists(st.binary(min_size=1, max_size=5) | st.sampled_from(CROSSING), max_size=12))
@example(CROSSING)
@settings(max_examples=300, deadline=None)
def test_tokens_that_split_characters_decode_as_a_whole(tokens: list[bytes]) -> None:
    decoder = Detokenizer(Bytes(tokens), [])
    pieces = [decoder.push(id_) for id_ in range(len(tokens))]
    assert "".join([*pieces, decoder.finish()]) == b"".join(tokens).decode(errors="replace")


def test_invalid_bytes_are_not_held_back_forever() -> None:
    decoder = Detokenizer(Bytes([b"\xe4"]), [])
    assert "".join(decoder.push(0) for _ in range(50)).count("\ufffd") > 25


@pytest.mark.parametrize("text", ["the theatre", "é😀 a"])
def test_tokenize_gives_each_token_its_place(text: str) -> None:
    spans = list(CODEC.tokenize(text))
    assert [span.id for span in spans] == CODEC.encode(text)
    assert all(text[span.start : span.stop] == span.text for span in spans)
