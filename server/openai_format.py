"""The shapes of OpenAI's answers: choices, log-probabilities, usage."""

from collections.abc import Iterable, Sequence
from typing import Any

from server.generation import Continuation, Piece
from server.sequence import FinishReason, PromptToken, Token
from server.text import TextCodec


def finish(reason: FinishReason | None) -> str | None:
    if reason is None:
        return None
    return "length" if reason == "length" else "stop"


def usage(prompts: Iterable[Continuation], generated: Sequence[Continuation]) -> dict[str, int]:
    """``prompts``: one continuation for each prompt; ``generated``: all of them."""
    prompt = sum(len(done.prompt_ids) for done in prompts)
    completion = sum(len(done.pieces) for done in generated)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def running_usage(one: Continuation, generated: int) -> dict[str, int]:
    """A continuation's usage when it has so many tokens."""
    prompt = len(one.prompt_ids)
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


class CompletionLogprobs:
    """Builds the four parallel lists of a completion's ``logprobs``; offsets count from the beginning."""

    def __init__(self, codec: TextCodec, top: int) -> None:
        self._codec, self._top, self._offset = codec, top, 0

    def of_prompt(self, tokens: Sequence[PromptToken]) -> dict[str, Any]:
        return self._lists([(t, self._codec.token_text(t.id)) for t in tokens])

    def of_pieces(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        return self._lists([(p.token, self._codec.token_text(p.token.id)) for p in pieces])

    def _lists(self, tokens: Sequence[tuple[Token | PromptToken, str]]) -> dict[str, Any]:
        offsets = []
        for _, text in tokens:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": [text for _, text in tokens],
            "token_logprobs": [token.logprob for token, _ in tokens],
            "top_logprobs": [self._alternatives(token) for token, _ in tokens] if self._top else None,
            "text_offset": offsets,
        }

    def _alternatives(self, token: Token | PromptToken) -> dict[str, float | None] | None:
        if token.logprob is None:
            return None
        shown: dict[str, float | None] = {}
        for top in token.top:  # two tokens may share a text; the likelier comes first and stays
            shown.setdefault(self._codec.token_text(top.id), top.logprob)
        return shown


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two ``logprobs`` one after the other."""
    return {key: None if first[key] is None else first[key] + second[key] for key in first}


def chat_logprobs(pieces: Sequence[Piece], codec: TextCodec) -> dict[str, Any]:
    def entry(id_: int, logprob: float | None) -> dict[str, Any]:
        text = codec.token_text(id_)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    content = [
        {
            **entry(piece.token.id, piece.token.logprob),
            "top_logprobs": [entry(top.id, top.logprob) for top in piece.token.top],
        }
        for piece in pieces
    ]
    return {"content": content, "refusal": None}
