"""Text ↔ token ids: encoding, decoding token by token, stop strings."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from loaders.tokenizer_faults import is_tokenizer_fault
from server.errors import Invalid
from server.service.text.control_tokens import SPLIT
from server.service.text.detokenizer import Detokenizer, continued
from server.service.text.offsets import TextOffsets
from server.service.text.stop_strings import StopStrings
from server.service.text.token_length import token_length
from server.service.text.vocabulary import Vocabulary, VocabularyToken, cleans_up

_log = logging.getLogger(__name__)
_LONG = 4000  # characters, a millisecond or two of encoding; longer texts don't block the event loop
_SLOW = 0.1  # seconds for a text of up to ``_LONG``: then the pattern backtracks catastrophically


@dataclass(frozen=True)
class TokenSpan:
    """A token of a text and its characters, ``start`` … ``stop`` − 1."""

    id: int
    text: str
    start: int
    stop: int


class TextCodec:
    """A tokenizer: encodes prompts and decodes generated tokens.

    Args:
        tokenizer: a ``transformers`` tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.vocabulary = Vocabulary(tokenizer)
        self._clean: Callable[[str], str] | None = (
            tokenizer.clean_up_tokenization if cleans_up(tokenizer) else None
        )
        self._backtracks = False
        self.token_length = token_length(tokenizer)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The text's token ids. Raises ``Invalid`` where the tokenizer fails on it."""
        ids: list[int] = self._encoded(text, add_special_tokens=add_special_tokens)["input_ids"]
        return ids

    def encode_conversation(self, text: str) -> list[int]:
        """The ids of a rendered conversation. The template has written its special tokens; those in messages
        are in parts (``control_tokens``). Raises ``Invalid`` as ``encode`` does."""
        return [id_ for part in text.split(SPLIT) for id_ in self.encode(part, add_special_tokens=False)]

    def is_quick(self, text: str) -> bool:
        """Whether the event loop may encode it: it is short, and no short text has taken long so far."""
        return len(text) <= _LONG and not self._backtracks

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids without special tokens. Raises ``GenerationFailed`` where the tokenizer fails."""
        text = self.vocabulary.decode(list(ids))
        return text if self._clean is None else self._clean(text)

    def token(self, id_: int) -> VocabularyToken:
        """One token of the vocabulary."""
        return self.vocabulary[id_]

    @property
    def beginning(self) -> list[int]:
        """What an empty prompt is replaced by: the beginning-of-text token, else the end token, if any."""
        ids = (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id)
        return [id_ for id_ in ids if id_ is not None][:1]

    def token_text(self, id_: int) -> str:
        """The text that one token adds; of a special token its name."""
        return self.vocabulary[id_].text

    def is_special(self, id_: int) -> bool:
        return self.vocabulary[id_].special

    def tokenize(self, text: str) -> Iterator[TokenSpan]:
        """The text's tokens with their offsets. Raises ``Invalid`` as ``encode`` does."""
        encoding = self._encoded(text, return_offsets_mapping=True)
        for id_, (start, stop) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
            yield TokenSpan(id_, text[start:stop], start, stop)

    def _encoded(self, text: str, **options: Any) -> Any:
        begun = time.thread_time()  # without the time of other threads
        try:
            return self._tokenizer(text, verbose=False, **options)
        except BaseException as error:
            if not is_tokenizer_fault(error):
                raise
            _log.warning("the tokenizer failed on %d characters (%s)", len(text), type(error).__name__)
            raise Invalid("the model's tokenizer fails on this text", param="inputs") from None
        finally:
            self._backtracks |= len(text) <= _LONG and time.thread_time() - begun > _SLOW

    def incremental(self, prompt: Sequence[int], stop: Sequence[str] = ()) -> "IncrementalDecoder":
        return IncrementalDecoder(self.vocabulary, Detokenizer(self.vocabulary, prompt, self._clean), stop)

    def offsets(self, prompt: Sequence[int] = ()) -> TextOffsets:
        """Offsets, in the generated text, of the tokens that follow a prompt."""
        return TextOffsets(self.vocabulary, prompt, self._clean)

    def shares(self, prompt: Sequence[int], ids: Sequence[int]) -> list[str]:
        """The text that each of the ids adds after a prompt; joined, they are the whole text.

        Special tokens add nothing; a character of several tokens is the last one's.
        """
        text = continued(self.vocabulary, prompt, ids)
        text = text if self._clean is None else self._clean(text)
        offsets = self.offsets(prompt)
        shown = [at for at, id_ in enumerate(ids) if not self.token(id_).hidden]
        starts = [offsets.add(ids[at]) for at in shown]
        shares = [""] * len(ids)
        for at, start, stop in zip(shown, starts, [*starts, len(text)][1:], strict=True):
            shares[at] = text[start:stop]
        return shares


class IncrementalDecoder:
    """Decodes tokens one by one, up to a stop string."""

    def __init__(self, vocabulary: Vocabulary, detokenizer: Detokenizer, stop: Sequence[str] = ()) -> None:
        self._vocabulary, self._detokenizer = vocabulary, detokenizer
        self._stop, self._stops = StopStrings(stop), bool(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._stop.found

    def push(self, id_: int) -> str:
        """The text that this token releases, up to a stop string if it completes one."""
        token = self._vocabulary[id_]
        if token.hidden and self._stops:  # its name follows the text that is held back
            return self._stop.push(self._detokenizer.settle(), token.text)
        return self._stop.push(self._detokenizer.push(id_))

    def finish(self) -> str:
        """The rest of the text, which was held back for tokens that might follow."""
        return self._stop.push(self._detokenizer.finish(), final=True)
