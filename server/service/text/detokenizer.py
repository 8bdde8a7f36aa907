"""Incremental detokenization: joined, the texts equal one decoding of all token ids."""

import codecs
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from server.service.text.vocabulary import VocabularyToken

_REPLACEMENT = "\ufffd"  # what an incomplete UTF-8 sequence decodes to
_LONGEST_CHARACTER = 4  # bytes of UTF-8, and so the most tokens of one character
_MOST_PENDING = 16  # tokens held back as an unfinished character before they are decoded as they are


class Tokens(Protocol):
    """The part of ``server.service.text.vocabulary.Vocabulary`` that detokenization needs."""

    def decode(self, ids: list[int]) -> str: ...
    def __getitem__(self, id_: int) -> VocabularyToken: ...


class Detokenizer:
    """Decodes tokens one by one. Released text never changes; bytes of unfinished characters are held back.

    A token's text depends on the tokens before it (spaces), so a few of those are decoded with it. Hidden
    tokens are left out: after one, a decoder would strip the space as at the beginning of a text. In a run of
    byte-fallback tokens a single wrong byte turns all of them into U+FFFD, so the run is held back until it
    ends, but for at most 16 tokens.

    Args:
        tokens: the vocabulary.
        prompt: ids that the text continues.
        clean: the tokenizer's ``clean_up_tokenization``, if it applies one.
    """

    def __init__(
        self, tokens: Tokens, prompt: Sequence[int], clean: Callable[[str], str] | None = None
    ) -> None:
        self._tokens, self._ids = tokens, tail(tokens, prompt)
        self._clean = CleanUp(clean) if clean is not None else None
        self._context = 0  # index of the first id that is decoded, as context of those after it
        self._read = len(self._ids)  # index after the last id that ended with a whole character
        # characters of the ids from ``_context`` on that were released
        self._released = _whole_characters(tokens, self._ids)

    def push(self, id_: int) -> str:
        """The text that this token completes."""
        if self._tokens[id_].hidden:
            return ""
        self._ids.append(id_)
        waits = self._tokens[id_].waits and len(self._ids) - self._read < _MOST_PENDING
        return self._cleaned("" if waits else self._decode(final=False), final=False)

    def settle(self) -> str:
        """The text held back, except an unfinished character."""
        return self._cleaned(self._decode(final=False), final=True)

    def finish(self) -> str:
        """All text held back, at the end of the sequence."""
        return self._cleaned(self._decode(final=True), final=True)

    def _cleaned(self, text: str, final: bool) -> str:
        return text if self._clean is None else self._clean.push(text, final)

    def _decode(self, final: bool) -> str:
        pending = len(self._ids) - self._read
        if not pending:
            return ""
        text = self._tokens.decode(self._ids[self._context :])
        late = pending >= _MOST_PENDING + _LONGEST_CHARACTER  # the run has passed the end of a character
        certain = text if final or late else text.rstrip(_REPLACEMENT)
        new = certain[self._released :]
        if len(certain) == len(text):
            self._context, self._read = self._read, len(self._ids)
            self._released = len(self._tokens.decode(self._ids[self._context :]))
        else:
            self._released += len(new)
        return new


def continued(tokens: Tokens, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text of ``ids`` after a prompt, before clean-up."""
    before = tail(tokens, prompt)
    shown = [id_ for id_ in ids if not tokens[id_].hidden]
    return tokens.decode([*before, *shown])[_whole_characters(tokens, before) :]


def tail(tokens: Tokens, prompt: Sequence[int]) -> list[int]:
    """The last visible tokens of a prompt, as context for those that follow; a run of bytes is not cut."""
    found: list[int] = []
    for id_ in reversed(prompt):
        token = tokens[id_]
        if token.hidden:
            continue
        found.append(id_)
        if len(found) >= _LONGEST_CHARACTER and not token.fallback:
            break
    return found[::-1]


def _whole_characters(tokens: Tokens, ids: list[int]) -> int:
    """Characters of the ids' text that no following token can change."""
    run = len(ids)
    while run and tokens[ids[run - 1]].fallback:
        run -= 1
    if run < len(ids):
        return len(tokens.decode(ids[:run])) + len(_characters(tokens, ids[run:])[0])
    return len(tokens.decode(ids)) - bool(_characters(tokens, ids)[1])


def _characters(tokens: Tokens, ids: Iterable[int]) -> tuple[str, bytes]:
    """The whole characters in the ids' bytes, and the bytes of an unfinished one."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(b"".join(tokens[id_].data for id_ in ids))
    return text, decoder.getstate()[0]


class CleanUp:
    """``clean_up_tokenization`` of a text that arrives in pieces.

    It deletes spaces before punctuation and contractions. Text is held back from a space on that the text
    after it may delete.

    Args:
        clean: the tokenizer's own, for a whole text.
    """

    # a beginning of " ' ", " n't", " 've", " 're" …, in which another rule may have deleted spaces
    _UNSETTLED = re.compile(r" [ 'n]*[vr]?\Z|\Z")

    def __init__(self, clean: Callable[[str], str]) -> None:
        self._clean, self._held = clean, ""

    def push(self, text: str, final: bool) -> str:
        """The cleaned text that nothing after it can change; with ``final`` all of it."""
        self._held += text
        unsettled = self._UNSETTLED.search(self._held)
        cut = len(self._held) if final or unsettled is None else unsettled.start()
        certain, self._held = self._held[:cut], self._held[cut:]
        return self._clean(certain)

    @property
    def held_characters(self) -> int:
        """Characters of the held text, if no text after it changes them."""
        return len(self._clean(self._held))
