"""Offsets of generated tokens in their text, in characters."""

import codecs
from collections.abc import Callable, Sequence

from server.service.text.detokenizer import CleanUp, Tokens, tail


class TextOffsets:
    """Computes the offsets of tokens one by one; a token inside a character has the character's offset.

    Args:
        tokens: the vocabulary.
        prompt: ids that the text continues; offsets begin after it.
        clean: the tokenizer's ``clean_up_tokenization``, if it applies one.
    """

    def __init__(
        self, tokens: Tokens, prompt: Sequence[int], clean: Callable[[str], str] | None = None
    ) -> None:
        self._tokens, self._clean = tokens, CleanUp(clean) if clean is not None else None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._count = 0  # characters
        self._run, self._before_run = b"", 0  # consecutive byte-fallback tokens, and the count before them
        self._begun = False
        for id_ in tail(tokens, prompt):
            self.add(id_)
        self._before_run -= self._count
        self._count = 0

    def add(self, id_: int) -> int:
        """The offset of the next token."""
        token = self._tokens[id_]
        if token.hidden:
            return self._offset()
        if token.fallback:
            self._before_run = self._before_run if self._run else self._count
            self._run += token.data
        else:
            self._end_run()
        offset = self._offset()
        # many decoders strip the space before the first token of a text
        first = not self._begun and not token.fallback and token.data[:1] == b" "
        data = self._tokens.decode([id_]).encode() if first else token.data
        self._begun = True
        text = self._decoder.decode(data)
        self._count += len(text if self._clean is None else self._clean.push(text, final=False))
        return offset

    def _offset(self) -> int:
        return self._count + (0 if self._clean is None else self._clean.held_characters)

    def _end_run(self) -> None:
        """In a run of byte tokens that is not UTF-8, each byte is decoded as U+FFFD."""
        if not self._run:
            return
        try:
            self._run.decode()
        except UnicodeDecodeError:
            self._count = self._before_run + len(self._run)
        self._decoder.reset()
        self._run = b""
