"""Prompts of an exact number of tokens, whatever the server's tokenizer."""

from itertools import cycle, islice
from random import Random

from loaders.texts import corpus
from server.bench.errors import BenchError
from server.bench.http.client import Client

_CHARACTERS_PER_TOKEN = 12  # more than any tokenizer needs on plain English
_TRIES = 50


class Texts:
    """Cuts prompts out of Python's help topics; the server counts their tokens."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._source = "\n\n".join(document.text for document in corpus.topics())
        self._random = Random(7)
        self._kept: dict[int, list[str]] = {}

    async def get(self, count: int, tokens: int, distinct: int = 16) -> list[str]:
        """``count`` prompts of exactly ``tokens`` tokens, of which up to ``distinct`` differ."""
        kept = self._kept.setdefault(tokens, [])
        while len(kept) < min(count, distinct):
            kept.append(await self._one(tokens))
        return list(islice(cycle(kept), count))

    async def _one(self, tokens: int) -> str:
        for _ in range(_TRIES):
            length = tokens * _CHARACTERS_PER_TOKEN
            start = self._random.randrange(max(len(self._source) - length, 1))
            text = self._source[start : start + length]
            spans = await self._tokens(text)
            if len(spans) > tokens:
                text = text[: spans[tokens - 1]["stop"]]
                if len(await self._tokens(text)) == tokens:  # a cut text may tokenize differently
                    return text
        raise BenchError(f"no text of {tokens} tokens was found for {self._client.url}")

    async def _tokens(self, text: str) -> list[dict[str, int]]:
        found: list[dict[str, int]] = await self._client.ask("POST", "/tokenize", {"inputs": text})
        return found
