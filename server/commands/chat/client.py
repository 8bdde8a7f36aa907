"""A bitdial server as ``bitdial chat`` uses it: the conversation's routes over HTTP."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx2

from server.commands.chat.answer import Answer
from server.commands.chat.conversation import Conversation, Sampling
from server.commands.chat.errors import ChatError, error_of, refusal_of
from server.commands.progress import ProgressBars

_CONNECT = 10.0  # seconds; an answer itself may take as long as the server permits
_CHAT, _CONTINUE = "v1/chat/completions", "v1/completions"
_CONTEXT_LENGTH = "context_length_exceeded"
_LEAST_TOKENS = 16


@dataclass(frozen=True)
class Served:
    """What a server says of itself and of one of its models."""

    model: str
    precision: str
    """The one in the name that was asked for, else the model's default one."""
    context: int
    """Most tokens of prompt and answer."""
    templated: bool
    """Whether the model has a chat template."""
    models: tuple[str, ...]
    """All models of the server, its default one first."""


class Client:
    """Routes of one server; every failure is a ``ChatError``.

    Args:
        key: its Bearer token, if it needs one.
        proxies: whether those of the environment are used; never for a server of one's own.
    """

    def __init__(self, url: str, key: str | None, proxies: bool = True) -> None:
        self.url = url.rstrip("/")
        self.model: str | None = None
        """Of every request; None: the server's default one."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout = httpx2.Timeout(None, connect=_CONNECT)
        try:
            self._http = httpx2.Client(
                base_url=self.url + "/", headers=headers, timeout=timeout, trust_env=proxies
            )
        except (ValueError, ImportError, httpx2.InvalidURL) as error:  # of a proxy, too
            raise ChatError(f"{self.url}: {error}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def get(self, path: str) -> Any:
        """A route's JSON, about the chosen model."""
        return self._get(path, self.model)

    def _get(self, path: str, model: str | None) -> Any:
        with self._said_plainly():
            response = self._http.get(path, params=_query(model))
            if not response.is_success:
                raise refusal_of(response)
            return response.json()

    def choose(self, model: str | None) -> Served:
        """Uses a model from here on; after an error, the one before.

        Args:
            model: its name, which may end with a precision: ``gpt2:nf4``; None: the server's default one.
        """
        info = self._get("info", model)
        named = info if model is None else self._get(f"v1/models/{quote(model)}", None)
        try:
            served = Served(
                str(info["model_id"]),
                str(named["precision"]),
                int(info["max_total_tokens"]),
                bool(info["chat_template"]),
                tuple(map(str, info.get("models", [info["model_id"]]))),
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            raise self._no_bitdial() from None
        self.model = None if model is None else served.model
        return served

    def load(self, precision: str) -> None:
        """Loads a precision and shows the progress; returns when it is ready.

        A server that keeps loading for its administrator loads at the first request instead.
        """
        try:
            with ProgressBars(precision, quiet=True) as bars:
                for event in self._events(f"precisions/{precision}/load", None):
                    if event.get("status") == "failed":
                        raise ChatError(str(event.get("error")))
                    if "progress" in event:
                        bars(event["stage"], event["progress"]["current"], event["progress"]["total"])
        except ChatError as error:
            if error.code not in ("unauthorized", "invalid_api_key"):
                raise

    def reply(
        self,
        conversation: Conversation,
        question: str,
        sampling: Sampling,
        answer: Answer,
        on_text: Callable[[str], None],
    ) -> None:
        """Answers the question; an exception, such as Ctrl-C's, cancels it at the server.

        As it comes near the context's end it may become shorter than the sampling permits.

        Args:
            answer: filled as it comes, in its precision.
            on_text: called with each piece of the text.
        """
        self._within_context(
            answer,
            _CHAT,
            {"messages": conversation.messages(question)},
            sampling,
            on_text,
        )

    def continuation(
        self, text: str, sampling: Sampling, answer: Answer, on_text: Callable[[str], None]
    ) -> None:
        """Continues a text by a model without chat template; otherwise as ``reply``."""
        self._within_context(answer, _CONTINUE, {"prompt": text}, sampling, on_text)

    def _within_context(
        self,
        answer: Answer,
        path: str,
        asked: Mapping[str, Any],
        sampling: Sampling,
        on_text: Callable[[str], None],
    ) -> None:
        tokens = sampling.max_new_tokens
        while True:
            body = {
                **asked,
                "max_tokens": tokens,
                **sampling.fields(),
                **({} if sampling.samples else {"temperature": 0}),
                "stream_options": {"include_usage": True},
            }
            try:
                return self._fill(answer, path, body, on_text)
            except ChatError as error:
                if error.code != _CONTEXT_LENGTH or tokens <= _LEAST_TOKENS:
                    raise
                tokens = max(_LEAST_TOKENS, tokens // 2)

    def _fill(
        self, answer: Answer, path: str, body: Mapping[str, Any], on_text: Callable[[str], None]
    ) -> None:
        begun, first = time.perf_counter(), None
        for event in self._events(path, {**body, "precision": answer.precision, "stream": True}):
            text = answer.take(event)
            if text is None:
                continue
            now = time.perf_counter()
            first = now if first is None else first
            answer.first_ms, answer.decode_seconds = (first - begun) * 1000, now - first
            answer.text += text
            on_text(text)

    def _events(self, path: str, body: Mapping[str, Any] | None) -> Iterator[dict[str, Any]]:
        """The JSON objects of a stream of server-sent events."""
        with (
            self._said_plainly(),
            self._http.stream("POST", path, json=body, params=_query(self.model)) as response,
        ):
            if not response.is_success:
                response.read()
                raise refusal_of(response)
            for event in httpx2.EventSource(response):
                if event.data == "[DONE]":
                    return
                told = json.loads(event.data)
                if not isinstance(told, dict):
                    raise self._no_bitdial()
                if "error" in told and "status" not in told:
                    raise error_of(told)
                yield told

    @contextmanager
    def _said_plainly(self) -> Iterator[None]:
        try:
            yield
        except httpx2.ConnectError as error:
            raise ChatError(f"no server at {self.url}: {error}", lost=True) from None
        except httpx2.HTTPError as error:
            what = str(error) or type(error).__name__
            raise ChatError(f"the connection to {self.url} failed: {what}", lost=True) from None
        except UnicodeEncodeError:  # of what was typed; the body is UTF-8
            raise ChatError("the message is not UTF-8") from None
        except (json.JSONDecodeError, httpx2.SSEError):
            raise self._no_bitdial() from None

    def _no_bitdial(self) -> ChatError:
        return ChatError(f"{self.url} does not answer as a bitdial server")


def _query(model: str | None) -> dict[str, str]:
    return {} if model is None else {"model": model}
