"""A running request: its parameters, and its text with the engine and the place that it holds."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from server.engine.sequence import SamplingParams
from server.engine.token_stream import TokenStream
from server.observability.ended import Ended, Operation
from server.report.choice import Choice
from server.service.text.codec import TextCodec
from server.service.text_stream import TextStream
from server.settings.types import AUTO

DEFAULT_NEW_TOKENS = 64


@dataclass(frozen=True)
class Conversation:
    """Messages for the model's chat template: ``role``, ``content`` and any further fields that it reads."""

    messages: list[dict[str, Any]]


@dataclass(frozen=True)
class GenerationRequest:
    """A client's request, validated."""

    prompt: str | list[int] | Conversation
    params: SamplingParams = field(default_factory=lambda: SamplingParams(max_new_tokens=DEFAULT_NEW_TOKENS))
    """Its ``max_new_tokens`` and ``seed`` are replaced by those of the request."""
    precision: str | None = None
    """Name or alias; the server's default if None."""
    fallback: bool = False
    """Serve with the default precision, and report why, where ``precision`` can't be served."""
    stop: tuple[str, ...] = ()
    truncate: int | None = None
    """Keep the prompt's last n tokens."""
    max_new_tokens: int | None = None
    """None: 64, or the rest of the context if that is less."""
    length_parameter: str | None = "max_new_tokens"
    """The field by which the client set ``max_new_tokens``; None if it set none. Error messages name it."""
    seed: int | None = None
    """None: drawn at random."""
    choice: Choice | None = None
    """Why the server chose ``precision``, where it did."""
    owner: str = ""
    """Cached prefixes are those of the same owner's requests (see ``server.http.auth.owner_of``)."""
    response_id: str | None = None
    """The id in the response's body, in dialects that have one."""
    stream: bool = False
    """The text is sent as it is generated."""


def operation_of(request: GenerationRequest) -> Operation:
    return "chat" if isinstance(request.prompt, Conversation) else "text_completion"


class Continuation(TextStream):
    """The text of a running request. ``close`` it in a ``finally``, before any await.

    Args:
        tokens, codec, prompt_ids: as of ``TextStream``.
        request: what the client sent.
        precision: the engine's.
        seed: the request's own or the drawn one.
        fallback_reason: why it is not the requested precision.
        held: gives back the engine and the tokens; moved into the continuation, unless this raises.
        on_close: called once, when the continuation is closed.
    """

    def __init__(
        self,
        tokens: TokenStream,
        codec: TextCodec,
        prompt_ids: list[int],
        request: GenerationRequest,
        *,
        precision: str,
        seed: int,
        fallback_reason: str | None,
        held: ExitStack,
        on_close: Callable[["Continuation"], None],
    ) -> None:
        super().__init__(tokens, codec, prompt_ids, request.stop)
        self.precision, self.seed = precision, seed
        self.precision_requested = request.precision if request.choice is None else AUTO
        self.choice, self.fallback_reason = request.choice, fallback_reason
        self._request = request
        self._held = held.pop_all()
        self._held.callback(on_close, self)

    def as_ended(self) -> Ended:
        """As ``ended``, with what the request says."""
        request, ended = self._request, self.ended(self.precision)
        ended.operation, ended.stream = operation_of(request), request.stream
        ended.response_id = request.response_id
        return ended

    def close(self) -> None:
        """Cancels what has not been generated yet, and gives the place and the engine back.

        It never awaits, so that no cancellation can interrupt it; any number of calls.
        """
        self._held.close()
