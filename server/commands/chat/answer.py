"""An answer as it comes, and its figures."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class Answer:
    """An answer, as far as it came."""

    precision: str
    text: str = ""
    tokens: int | None = None
    """Generated; None while unknown."""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    first_ms: float | None = None
    """Time to the first token, as seen from here."""
    decode_seconds: float = 0.0
    """From the first token to the last."""
    cut: bool = False
    """Whether it ended at the most tokens that were asked for."""

    def figures(self) -> str:
        """Tokens and times in words."""
        parts = [] if self.tokens is None else [f"{self.tokens} tokens"]
        if self.first_ms is not None:
            parts.append(f"first after {self.first_ms:.0f} ms")
        if self.tokens and self.tokens > 1 and self.decode_seconds > 0:
            parts.append(f"{(self.tokens - 1) / self.decode_seconds:.1f} tokens/s")
        if self.cached_tokens:
            parts.append(f"{self.cached_tokens} of {self.prompt_tokens} prompt tokens cached")
        if self.cut:
            parts.append("cut at the most tokens of an answer (/set max_new_tokens)")
        return f"{self.precision}: {', '.join(parts) or 'nothing'}"

    def take(self, event: Mapping[str, Any]) -> str | None:
        """Takes over an event's figures; returns its text, None if it has no token."""
        self.precision = event.get("precision") or self.precision
        if usage := event.get("usage"):
            self.tokens, self.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
            self.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        text = None
        for choice in event.get("choices", ()):
            self.cut = choice.get("finish_reason") == "length"
            delta = choice.get("delta") or choice
            if "role" not in delta:  # the first one of a chat has no token
                text = delta.get("content", delta.get("text"))
        if text is not None:
            self.tokens = (self.tokens or 0) + 1  # until the usage comes, which a stopped answer lacks
        return text
