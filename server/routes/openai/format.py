"""Parts of OpenAI's responses: finish reasons, log-probabilities, usage."""

from collections.abc import Iterable, Sequence
from typing import Any

from server.engine.sequence import FinishReason, PromptToken, Token, TokenLogprob
from server.service.generation import Continuation, Piece
from server.service.text.codec import TextCodec


def finish(reason: FinishReason | None) -> str | None:
    if reason is None:
        return None
    return "length" if reason == "length" else "stop"


def usage(prompts: Iterable[Continuation], generated: Sequence[Continuation]) -> dict[str, Any]:
    """Token counts. ``prompts``: one continuation for each prompt; ``generated``: all of them."""
    return _usage(list(prompts), sum(len(done.pieces) for done in generated))


def running_usage(one: Continuation, generated: int) -> dict[str, Any]:
    """A continuation's usage after ``generated`` tokens."""
    return _usage([one], generated)


def _usage(prompts: Sequence[Continuation], completion: int) -> dict[str, Any]:
    prompt = sum(len(one.prompt_ids) for one in prompts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in prompts)},
    }


class CompletionLogprobs:
    """Builds the four parallel lists of a completion's ``logprobs``, piece by piece.

    Args:
        top: number of alternatives to each token.
        prompt: the prompt's token ids.
        prompt_characters: length of the prompt's text, at which the offsets of the continuation start.
    """

    def __init__(self, codec: TextCodec, top: int, prompt: Sequence[int], prompt_characters: int) -> None:
        self._codec, self._top, self._vocabulary = codec, top, codec.vocabulary
        self._offsets, self._prompt_characters = codec.offsets(prompt), prompt_characters

    def of_prompt(self, tokens: Sequence[PromptToken]) -> dict[str, Any]:
        offsets = self._codec.offsets()
        return self._lists(tokens, [offsets.add(token.id) for token in tokens])

    def of_pieces(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        offsets = [self._prompt_characters + self._offsets.add(piece.token.id) for piece in pieces]
        return self._lists([piece.token for piece in pieces], offsets)

    def _lists(self, tokens: Sequence[Token | PromptToken], offsets: list[int]) -> dict[str, Any]:
        return {
            "tokens": [self._text(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._alternatives(token) for token in tokens] if self._top else None,
            "text_offset": offsets,
        }

    def _alternatives(self, token: Token | PromptToken) -> dict[str, float | None] | None:
        if token.logprob is None:
            return None
        own = self._text(token.id)
        by_text: dict[str, float | None] = {}
        for id_, logprob in with_own(token):
            text = self._text(id_)
            if id_ != token.id and (text == own or text in by_text):  # two tokens may share a text
                text = f"token_id:{id_}"
            by_text[text] = logprob
        return by_text

    def _text(self, id_: int) -> str:
        """As OpenAI does: a partial character is written as ``bytes:\\xe2\\x80``."""
        token = self._vocabulary[id_]
        return f"bytes:{_escaped(token.data)}" if token.partial else token.text


def _escaped(data: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in data)


def with_own(token: Token | PromptToken) -> tuple[TokenLogprob, ...]:
    """A token's alternatives and the token itself, which OpenAI adds if it is not among the likeliest."""
    for id_, _ in token.top:
        if id_ == token.id:
            return token.top
    return (*token.top, TokenLogprob(token.id, token.logprob))


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two ``logprobs`` concatenated."""
    return {key: None if first[key] is None else first[key] + second[key] for key in first}


def chat_logprobs(pieces: Sequence[Piece], codec: TextCodec) -> dict[str, Any]:
    """A chat choice's ``logprobs``. A partial character is ``\\xe2\\x80``; all ``bytes`` make the text."""

    def entry(id_: int, logprob: float | None) -> dict[str, Any]:
        token = codec.token(id_)
        text = _escaped(token.data) if token.partial else token.text
        return {"token": text, "logprob": logprob, "bytes": list(token.data)}

    def alternatives(token: Token) -> list[dict[str, Any]]:
        return [entry(id_, logprob) for id_, logprob in with_own(token)] if token.top else []

    content = [
        {**entry(piece.token.id, piece.token.logprob), "top_logprobs": alternatives(piece.token)}
        for piece in pieces
    ]
    return {"content": content, "refusal": None}
