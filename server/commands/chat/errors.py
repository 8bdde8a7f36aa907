"""What ``bitdial chat`` says when a server, or the way to it, refuses."""

from collections.abc import Mapping
from typing import Any

import httpx2

from server.commands.side_by_side import shown


class ChatError(Exception):
    """What the server, or the way to it, has refused; the message is for people.

    Args:
        code: the OpenAI dialect's ``code``.
        exit_code: what the program ends with, if it must end.
        lost: whether there was no connection, or it broke.
    """

    def __init__(
        self,
        message: str,
        code: str | None = None,
        exit_code: int | None = None,
        lost: bool = False,
    ) -> None:
        super().__init__(shown(message))
        self.code, self.exit_code, self.lost = code, exit_code, lost


def refusal_of(response: httpx2.Response) -> ChatError:
    """What a response other than 2xx says; its body has been read."""
    try:
        return error_of(response.json())
    except (ValueError, AttributeError):
        return ChatError(f"{response.url} answered {response.status_code} {response.reason_phrase}")


def error_of(body: Mapping[str, Any]) -> ChatError:
    """An error in either dialect."""
    error = body.get("error")
    if isinstance(error, Mapping):
        return ChatError(str(error.get("message")), error.get("code"))
    return ChatError(str(error), body.get("error_type"))
