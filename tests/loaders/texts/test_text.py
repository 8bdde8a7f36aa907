"""The text of a quality measurement: read lazily, split without changing a token, each token scored once."""

from io import BytesIO, RawIOBase
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaders.quality.greedy import Prompts
from loaders.texts.text import Text, TextError, TokenStream, Window, text_file, windows
from tests.checkpoints import byte_tokenizer

WORDS = "the naïve café – in an other theatre,\n\n    東京 \t and  then there's 12 …\n"


def text(content: str, mark: bytes = b"") -> Text:
    data = mark + content.encode()
    return Text("t", len(data), lambda: BytesIO(data))


@pytest.mark.parametrize("block", [24, 50, 64, 1000, 10**6])
def test_pieces_have_the_tokens_of_the_whole(block: int) -> None:
    content = WORDS * 9
    tokenizer = byte_tokenizer()
    stream = TokenStream(text(content), tokenizer, block)
    assert list(stream) == tokenizer(content)["input_ids"]
    assert (stream.bytes, stream.expected_tokens()) == (len(content.encode()), stream.tokens)


def test_a_byte_order_mark_is_not_part_of_the_text() -> None:
    assert "".join(text("abc", b"\xef\xbb\xbf").pieces()) == "abc"


@given(words=st.text(max_size=200), block=st.integers(1, 60))
def test_pieces_joined_are_the_text(words: str, block: int) -> None:
    content = words.encode("utf-8", "ignore").decode().removeprefix("\ufeff")
    assert "".join(text(content).pieces(block)) == content


def test_a_text_without_spaces_is_cut_too() -> None:
    assert max(map(len, text("x" * 1000).pieces(100))) <= 100


class Endless(RawIOBase):
    """A text without end."""

    def read(self, size: int = -1) -> bytes:
        assert size > 0
        return b" the" * (size // 4)


def test_only_what_the_windows_need_is_read() -> None:
    endless: Any = Endless
    stream = TokenStream(Text("endless", 2**50, endless), byte_tokenizer(), 4096)
    assert [len(window.ids) for window in islice(windows(stream, 256, 128), 3)] == [256] * 3
    assert stream.bytes <= 2 * 4096
    assert stream.expected_tokens() == pytest.approx(2**48, rel=0.01)


@given(count=st.integers(0, 300), length=st.integers(2, 40), data=st.data())
def test_every_token_counts_once(count: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length))
    found = list(windows(range(count), length, stride))
    scored = [id_ for window in found for id_ in window.scored]
    assert all(len(window.ids) <= length for window in found)
    assert all(window.ids == list(range(window.ids[0], window.ids[-1] + 1)) for window in found)
    if stride < length:
        assert scored == list(range(1, count))
    else:  # a window's first token has no context
        assert scored == [id_ for id_ in range(count) if id_ % length]


@given(count=st.integers(1, 20), length=st.integers(1, 30_000))
def test_prompts_are_few_and_evenly_spread(count: int, length: int) -> None:
    prompts = Prompts(count, 256)
    for window in windows(range(length + 1), 256, 128):
        prompts.offer(window)
    chosen = prompts.chosen()
    possible = max(1, -(-(length + 1 - 31) // 128))
    assert min(count, possible) / 2 <= len(chosen) <= count
    starts = [prompt[0] for prompt in chosen]
    assert starts == sorted(set(starts))
    if len(chosen) > 1:
        gaps = [after - before for before, after in pairwise(starts)]
        assert max(gaps) <= 3 * min(gaps)


def test_a_short_text_is_one_short_prompt() -> None:
    prompts = Prompts(8, 256)
    prompts.offer(Window([5, 6, 7], 1))
    assert prompts.chosen() == [[5, 6, 7]]
    assert prompts.tokens == 64


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.txt"):
        with pytest.raises(TextError, match="is not a file"):
            text_file(path)
