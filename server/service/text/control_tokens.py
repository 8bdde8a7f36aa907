"""Names of special tokens in the contents of a conversation, which must stay text.

A chat template writes control tokens between the messages as text, such as ``<|im_end|>``. A message that
contains the same characters could otherwise end its turn and speak for the system.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SPLIT = "\ufdd0"
"""Where a rendered conversation is split before it is encoded; a noncharacter, which no text interchanges."""


class ControlTokens:
    """
    Args:
        names: of the special tokens.
    """

    def __init__(self, names: Iterable[str]) -> None:
        alternatives = "|".join(
            re.escape(name) for name in sorted(names, key=len, reverse=True) if len(name) > 1
        )
        # a lookahead, so that names that overlap are found as well
        self._begins = re.compile(f"(?=(?:{alternatives}))(.)", re.DOTALL) if alternatives else None

    def as_text(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The messages with ``SPLIT`` within every name, so that its parts are encoded as text."""
        return [{key: self._marked(key, value) for key, value in message.items()} for message in messages]

    def _marked(self, key: str, value: Any) -> Any:
        if self._begins is None or key == "role" or not isinstance(value, str):
            return value
        return self._begins.sub(rf"\1{SPLIT}", value)
