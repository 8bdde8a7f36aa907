"""Text ↔ token ids: encoding, decoding token by token, stop strings."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import TokenizersBackend

from server.token_length import token_length

_REPLACEMENT = "\ufffd"  # what an incomplete UTF-8 sequence decodes to
_LONGEST_CHARACTER = 4  # bytes, so as many tokens may be needed to make one whole
_MOST_PENDING = 16  # tokens of which none ended with a whole character: they are no text


@dataclass(frozen=True)
class TokenSpan:
    """A token of a text and the characters start … stop − 1 that it stands for."""

    id: int
    text: str
    start: int
    stop: int


class TextCodec:
    """A tokenizer as the service needs it.

    Args:
        tokenizer: a ``transformers`` tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._texts: dict[int, str] = {}
        self._decode = _decoder(tokenizer)
        self.token_length = token_length(tokenizer)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        encoding = self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
        ids: list[int] = encoding["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        return self._decode(list(ids))

    def token_text(self, id_: int) -> str:
        """One token by itself, special ones by name. Remembered: an answer may tell of a hundred thousand."""
        if id_ not in self._texts:
            self._texts[id_] = self._tokenizer.decode([id_], skip_special_tokens=False)
        return self._texts[id_]

    def is_special(self, id_: int) -> bool:
        return id_ in self._special

    def tokenize(self, text: str) -> Iterator[TokenSpan]:
        encoding = self._tokenizer(text, return_offsets_mapping=True, verbose=False)
        for id_, (start, stop) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
            yield TokenSpan(id_, text[start:stop], start, stop)

    @property
    def has_chat_template(self) -> bool:
        return bool(getattr(self._tokenizer, "chat_template", None))

    def render_chat(self, messages: list[dict[str, Any]]) -> str:
        """The text of a conversation, special tokens included, ready for the assistant's turn."""
        text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text

    def incremental(self, prompt: Sequence[int], stop: Sequence[str] = ()) -> "IncrementalDecoder":
        return IncrementalDecoder(self, prompt, stop)


def _decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """Ids → text without special tokens. Where ``transformers`` adds nothing to what the tokenizer beneath it
    does, that one is called: twice for every token of every stream, its checks cost more than its work."""
    beneath = getattr(tokenizer, "backend_tokenizer", None)
    adds = type(tokenizer)._decode is not TokenizersBackend._decode or tokenizer.clean_up_tokenization_spaces
    if beneath is None or adds:
        return partial(tokenizer.decode, skip_special_tokens=True)
    return partial(beneath.decode, skip_special_tokens=True)


class IncrementalDecoder:
    """Turns tokens into text as they come; what it has given out is never taken back.

    Held back until more is known: bytes of an unfinished character, and the beginning of what may become a
    stop string. A token's text depends on its neighbours (spaces), so some before it are decoded along.
    """

    def __init__(self, codec: TextCodec, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._codec, self._stop = codec, tuple(stop)
        self._ids = list(prompt[-_LONGEST_CHARACTER:])
        self._context = 0  # first id decoded along, for its neighbours' sake
        self._read = len(self._ids)  # where text last ended with a whole character
        self._given = len(codec.decode(self._ids))  # characters, from the context on, that are given out
        self._held = ""  # text that may yet turn out to begin a stop string
        self.stopped = False
        """Whether a stop string has come."""

    def push(self, id_: int) -> str:
        """The text that this token releases, up to a stop string if that completes one."""
        self._ids.append(id_)
        return self._release(self._decode(final=False), final=False)

    def finish(self) -> str:
        """Whatever was held back, now that nothing more will come."""
        return self._release(self._decode(final=True), final=True)

    def _decode(self, final: bool) -> str:
        text = self._codec.decode(self._ids[self._context :])
        pending = len(self._ids) - self._read
        certain = text if final or pending >= _MOST_PENDING else text.rstrip(_REPLACEMENT)
        new = certain[self._given :]
        if len(certain) == len(text):
            self._context, self._read = self._read, len(self._ids)
            self._given = len(self._codec.decode(self._ids[self._context :]))
        else:
            self._given += len(new)
        return new

    def _release(self, text: str, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0 if final else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
