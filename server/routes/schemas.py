"""Request bodies of the native dialect: every field and limit, declared once.

Limits that are settings are read from the validation context. The OpenAI dialect's bodies are in
``server.routes.openai.schemas``.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    JsonValue,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

import loaders
from server.errors import Invalid
from server.http.validation import Strict
from server.settings.server import Settings
from server.settings.types import ALL, AUTO

MAX_STOP_LENGTH = 256
PRECISION_NAMES: list[JsonValue] = [*loaders.PRECISIONS, *loaders.ALIASES]
_UNSUPPORTED = ("watermark", "grammar", "adapter_id", "tools")


def _settings(info: ValidationInfo) -> Settings:
    settings: Settings = (info.context or {})["settings"]
    return settings


def _stop_list(value: Any, info: ValidationInfo) -> Any:
    """One string or a list of them; a long list is refused before its items are validated."""
    listed = [value] if isinstance(value, str) else value
    most = _settings(info).max_stop_sequences
    if isinstance(listed, list) and len(listed) > most:
        raise ValueError(f"at most {most} stop strings")
    return listed


def within_best_of(value: int | None, info: ValidationInfo) -> int | None:
    """Validates a number of continuations against ``max_best_of``."""
    most = _settings(info).max_best_of
    if value is not None and value > most:
        raise ValueError(f"at most {most}")
    return value


Penalty = Annotated[float, Field(ge=-2, le=2)]
OpenUnit = Annotated[float, Field(gt=0, lt=1)]
Seed = Annotated[
    int,
    Field(ge=0, lt=2**64),
    # the schema has no upper limit: 2⁶⁴ exceeds JavaScript's exact integers, and tools written in it send it
    WithJsonSchema({"type": "integer", "format": "uint64", "minimum": 0}),
]
_StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stop = Annotated[
    list[_StopString], BeforeValidator(_stop_list, json_schema_input_type=_StopString | list[_StopString])
]


_MOST_NAMES = 64  # aliases and repetitions included


def _names_or_all(value: Any) -> Any:
    if value == ALL:
        return value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError('must be a list of names, or "all"')
    if not 1 <= len(value) <= _MOST_NAMES:
        raise ValueError(f"must name from 1 to {_MOST_NAMES}")
    return value


_Name = Annotated[str, Field(json_schema_extra={"enum": PRECISION_NAMES})]
_Listed = Annotated[list[_Name], Field(min_length=1, max_length=_MOST_NAMES)]
_All = Annotated[str, Field(pattern="^all$")]
NamesOrAll = Annotated[Any, BeforeValidator(_names_or_all, json_schema_input_type=_All | _Listed)]


class AutoBounds(Strict):
    """Bounds on the saved report's figures, for precision ``auto``."""

    max_memory_bytes: int | None = Field(None, ge=1, description="weights and KV cache")
    max_perplexity_increase: float | None = Field(None, ge=0, description="0.02 is two per cent of fp32's")
    max_kl: float | None = Field(None, ge=0, description="mean divergence from fp32, nats a token")
    min_tokens_per_second: float | None = Field(None, gt=0, description="decoded by one stream")
    prefer: Literal["quality", "speed", "memory"] | None = None


class Sampling(Strict):
    """How to continue a prompt."""

    max_new_tokens: int | None = Field(
        None, ge=1, examples=[20], description="64, or what the context has left, if left out"
    )
    temperature: float | None = Field(None, gt=0, le=100, description="1 if left out; samples if set")
    top_k: int | None = Field(None, ge=1, description="all tokens if left out; samples if set")
    top_p: OpenUnit | None = Field(None, description="off if left out; samples if set")
    typical_p: OpenUnit | None = Field(None, description="off if left out; samples if set")
    min_p: float | None = Field(None, ge=0, lt=1, description="off if left out; samples if set")
    do_sample: bool | None = Field(None, description="false if left out, unless another parameter samples")
    repetition_penalty: float | None = Field(None, gt=0, description="1, which is none, if left out")
    frequency_penalty: Penalty | None = Field(None, description="0 if left out")
    presence_penalty: Penalty | None = Field(None, description="0 if left out")
    seed: Seed | None = Field(None, description="random if left out")
    stop: Stop | None = Field(None, description="none if left out")
    truncate: int | None = Field(None, ge=1, description="the whole prompt if left out")
    ignore_eos: bool | None = Field(None, description="false if left out")

    @property
    def samples(self) -> bool:
        """Whether sampling is requested, or implied by a parameter that only sampling uses."""
        given = (self.temperature, self.top_k, self.top_p, self.typical_p, self.min_p)
        return bool(self.do_sample) or any(value is not None for value in given)


class Parameters(Sampling):
    """How to continue a prompt, and which details to return."""

    best_of: int | None = Field(None, ge=1)
    return_full_text: bool | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    top_n_tokens: int | None = Field(None, ge=0, le=5, description="0 if left out")
    watermark: Any = None
    grammar: Any = None
    adapter_id: Any = None
    tools: Any = None

    _best_of = field_validator("best_of")(within_best_of)

    @field_validator(*_UNSUPPORTED)
    @classmethod
    def _not_supported(cls, value: Any) -> Any:
        if value:
            raise ValueError("not supported")
        return value


class GenerateBody(Parameters):
    """Body of ``POST /generate``; parameters are also accepted inside ``parameters``."""

    inputs: str = Field(min_length=1, examples=["Once upon a time"])
    precision: Any = Field(None, examples=["int8"], json_schema_extra={"enum": [*PRECISION_NAMES, AUTO]})
    auto: AutoBounds | None = None
    stream: bool | None = None
    fallback: bool | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.best_of or 1) > 1 and not self.samples:
            raise ValueError("best_of above 1 needs sampling")
        return self

    def check_stream(self) -> None:
        """Checks that the body can be streamed.

        Raises:
            Invalid
        """
        if (self.best_of or 1) > 1:
            raise Invalid("best_of above 1 can't be streamed", param="best_of")
        if self.decoder_input_details:
            raise Invalid("decoder_input_details can't be streamed", param="decoder_input_details")


class TokenizeBody(Strict):
    """Body of ``POST /tokenize``."""

    inputs: str = Field(min_length=1, examples=["Once upon a time"])
