"""Token ids → text as they come, equal to what decoding all of them at the end would give."""

import codecs
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from server.service.text.vocabulary import VocabularyToken

_REPLACEMENT = "\ufffd"  # what an incomplete UTF-8 sequence decodes to
_LONGEST_CHARACTER = 4  # bytes, so as many tokens may be needed to make one whole
_MOST_PENDING = 16  # tokens that wait for one another before they are decoded as they are


class Tokens(Protocol):
    """What is needed of ``server.service.text.vocabulary.Vocabulary``."""

    def decode(self, ids: list[int]) -> str: ...
    def __getitem__(self, id_: int) -> VocabularyToken: ...


class Detokenizer:
    """What it has given out is never taken back; held back are bytes of unfinished characters.

    A token's text depends on its neighbours (spaces), so some before it are decoded along. Hidden tokens are
    none of them: a decoder would take what follows for the beginning of a text. Of
    consecutive byte-fallback tokens all read as U+FFFD if the last one is wrong, so they wait for their end,
    though not for more than 16.

    Args:
        tokens: the vocabulary.
        prompt: ids that the text continues.
        clean: the tokenizer's clean-up of spaces, if it has one.
    """

    def __init__(
        self, tokens: Tokens, prompt: Sequence[int], clean: Callable[[str], str] | None = None
    ) -> None:
        self._tokens, self._ids = tokens, tail(tokens, prompt)
        self._clean = CleanUp(clean) if clean is not None else None
        self._context = 0  # first id decoded along, for its neighbours' sake
        self._read = len(self._ids)  # where text last ended with a whole character
        # characters, from the context on, that are given out
        self._given = _whole_characters(tokens, self._ids)

    def push(self, id_: int) -> str:
        """The text that this token completes."""
        if self._tokens[id_].hidden:
            return ""
        self._ids.append(id_)
        waits = self._tokens[id_].waits and len(self._ids) - self._read < _MOST_PENDING
        return self._cleaned("" if waits else self._decode(final=False), final=False)

    def settle(self) -> str:
        """What is held back for what may follow, but no unfinished character."""
        return self._cleaned(self._decode(final=False), final=True)

    def finish(self) -> str:
        """Whatever was held back, now that nothing more will come."""
        return self._cleaned(self._decode(final=True), final=True)

    def _cleaned(self, text: str, final: bool) -> str:
        return text if self._clean is None else self._clean.push(text, final)

    def _decode(self, final: bool) -> str:
        pending = len(self._ids) - self._read
        if not pending:
            return ""
        text = self._tokens.decode(self._ids[self._context :])
        late = pending >= _MOST_PENDING + _LONGEST_CHARACTER  # a run of whole characters ended one meanwhile
        certain = text if final or late else text.rstrip(_REPLACEMENT)
        new = certain[self._given :]
        if len(certain) == len(text):
            self._context, self._read = self._read, len(self._ids)
            self._given = len(self._tokens.decode(self._ids[self._context :]))
        else:
            self._given += len(new)
        return new


def continued(tokens: Tokens, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text of ``ids`` where they follow a prompt, before any clean-up."""
    before = tail(tokens, prompt)
    shown = [id_ for id_ in ids if not tokens[id_].hidden]
    return tokens.decode([*before, *shown])[_whole_characters(tokens, before) :]


def tail(tokens: Tokens, prompt: Sequence[int]) -> list[int]:
    """The end of a prompt, by which what follows it is read: some visible tokens, and no run of bytes cut."""
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
    """How many characters of the ids' text stay as they are whatever follows."""
    run = len(ids)
    while run and tokens[ids[run - 1]].fallback:
        run -= 1
    if run < len(ids):
        return len(tokens.decode(ids[:run])) + len(_characters(tokens, ids[run:])[0])
    return len(tokens.decode(ids)) - bool(_characters(tokens, ids)[1])


def _characters(tokens: Tokens, ids: Iterable[int]) -> tuple[str, bytes]:
    """The whole characters of the ids' bytes, and what is left over of one that is unfinished."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(b"".join(tokens[id_].data for id_ in ids))
    return text, decoder.getstate()[0]


class CleanUp:
    """``clean_up_tokenization`` on a text that comes in pieces.

    It deletes spaces before punctuation and contractions, by what follows: text is held back from a space on
    that may yet turn out to be one of them.

    Args:
        clean: the tokenizer's own, of a whole text.
    """

    # what may begin " ' ", " n't", " 've", " 're" …, of which another rule may have deleted spaces before
    _UNSETTLED = re.compile(r" [ 'n]*[vr]?\Z|\Z")

    def __init__(self, clean: Callable[[str], str]) -> None:
        self._clean, self._held = clean, ""

    def push(self, text: str, final: bool) -> str:
        """What is certain; with ``final`` all of it."""
        self._held += text
        unsettled = self._UNSETTLED.search(self._held)
        cut = len(self._held) if final or unsettled is None else unsettled.start()
        certain, self._held = self._held[:cut], self._held[cut:]
        return self._clean(certain)

    @property
    def held_characters(self) -> int:
        """How many characters the held text has, if nothing comes that changes it."""
        return len(self._clean(self._held))
