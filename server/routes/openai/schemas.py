"""Request bodies of the OpenAI dialect: OpenAI's fields and vLLM's additions."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from server.errors import Invalid
from server.http.validation import Strict
from server.routes.openai.ignored_fields import IgnoredFields, IgnoredInChats, IgnoredInCompletions
from server.routes.schemas import PRECISION_NAMES, AutoBounds, Parameters, Penalty, Stop, within_best_of
from server.settings.types import AUTO

_IDS: dict[str, JsonValue] = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPTS: list[JsonValue] = [
    {"type": "string"},
    {"type": "array", "items": {"type": "string"}, "minItems": 1},
    _IDS,
    {"type": "array", "items": _IDS, "minItems": 1},
]
_ANY_SEED = -1
"""The seed that clients send to request a random one."""
_MOST_STOP_IDS = 1024
SignedSeed = Annotated[
    int,
    Field(ge=-(2**63), lt=2**64),
    WithJsonSchema({"type": "integer"}),  # see Seed for the missing limits
]
Bias = Annotated[float, Field(ge=-100, le=100)]


def _last_id(info: ValidationInfo) -> int:
    return info.context["vocabulary"] - 1 if info.context else 0


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(
        None, description="with include_usage: the counts so far in every chunk"
    )
    include_obfuscation: bool | None = Field(None, description="accepted, not used")


class OpenAIBody(IgnoredFields):
    """Fields of completions and chat."""

    model: str | None = None
    n: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, description="1 if left out; 0 is greedy")
    top_p: float | None = Field(None, ge=0, le=1, description="1 if left out; 0 is greedy")
    stop: Stop | None = None
    seed: SignedSeed | None = Field(None, description="-1: drawn, as if left out")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[str, Bias] | None = None
    precision: Any = Field(None, json_schema_extra={"enum": [*PRECISION_NAMES, AUTO]})
    auto: AutoBounds | None = None
    fallback: bool | None = None

    # vLLM's
    top_k: int | None = Field(None, ge=-1, description="0 and -1: all tokens")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0)
    stop_token_ids: list[int] | None = Field(None, max_length=_MOST_STOP_IDS)
    truncate_prompt_tokens: int | None = Field(None, ge=1, description="keeps the prompt's last n tokens")

    _n = field_validator("n")(within_best_of)

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _token_ids(cls, value: Any, info: ValidationInfo) -> Any:
        """Raises at the first invalid entry: there may be as many as fit into a body."""
        last = _last_id(info)
        for key, bias in value.items() if isinstance(value, dict) else ():
            if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) <= last):
                raise ValueError(f"token ids go from 0 to {last}")
            if type(bias) not in (int, float) or not -100 <= bias <= 100:
                raise ValueError("a bias is a number from -100 to 100")
        return value

    @field_validator("stop_token_ids")
    @classmethod
    def _within_vocabulary(cls, value: list[int] | None, info: ValidationInfo) -> list[int] | None:
        last = _last_id(info)
        if not all(0 <= id_ <= last for id_ in value or ()):
            raise ValueError(f"token ids go from 0 to {last}")
        return value

    def parameters(self, max_tokens: int | None) -> Parameters:
        """These sampling parameters in the native dialect.

        Sampling is the default here; temperature 0 is greedy, and so is top_p 0: its nucleus is one token.
        """
        greedy = self.temperature == 0 or self.top_p == 0
        sampling: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": None if self.top_p == 1 else self.top_p,
            "top_k": self.top_k if (self.top_k or 0) > 0 else None,
            "min_p": self.min_p or None,
        }
        return Parameters.model_construct(
            max_new_tokens=max_tokens,
            do_sample=not greedy,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            stop=self.stop,
            truncate=self.truncate_prompt_tokens,
            ignore_eos=self.ignore_eos,
            **({} if greedy else sampling),
        )

    @property
    def chosen_seed(self) -> int | None:
        """None if a seed is to be drawn."""
        return None if self.seed == _ANY_SEED else self.seed

    @property
    def length_parameter(self) -> str | None:
        """The field that set the number of tokens, if any."""
        raise NotImplementedError

    @property
    def bias(self) -> tuple[tuple[int, float], ...]:
        return tuple((int(key), value) for key, value in (self.logit_bias or {}).items())

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with its token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk includes the counts so far."""
        options = self.stream_options
        return self.includes_usage and bool(options and options.continuous_usage_stats)


class CompletionBody(OpenAIBody, IgnoredInCompletions):
    """Body of ``POST /v1/completions``."""

    prompt: Any = Field(json_schema_extra={"anyOf": _PROMPTS})
    best_of: int | None = Field(None, ge=1)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=5)
    max_tokens: int | None = Field(None, ge=0, description="16 if left out")

    _best_of = field_validator("best_of")(within_best_of)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise Invalid("max_tokens 0 needs echo", param="max_tokens")
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise Invalid("best_of must not be less than n", param="best_of")
        if self.stream and (self.best_of or 1) > (self.n or 1):
            raise Invalid("best_of above n can't be streamed", param="best_of")
        return self

    @property
    def length_parameter(self) -> str | None:
        """The field that set the number of tokens, if any."""
        return None if self.max_tokens is None else "max_tokens"


class TextPart(BaseModel):
    """A text part of a message's content; its other fields, such as cache hints, are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")
    type: Literal["text"]
    text: str


def _joined(value: Any, info: ValidationInfo) -> Any:
    """The joined text of a content sent in parts; empty for an assistant's turn without content."""
    if value is None and info.data.get("role") == "assistant":
        return ""
    if not isinstance(value, list):
        return value
    try:
        return "".join(TextPart.model_validate(part).text for part in value)
    except ValidationError:
        raise ValueError("a part must be {type: text, text: …}") from None


class Message(BaseModel):
    """One turn; additional fields are passed to the chat template."""

    model_config = ConfigDict(strict=True, extra="allow")
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined, json_schema_input_type=str | list[TextPart] | None)] = (
        Field(None, validate_default=True)
    )


class ChatBody(OpenAIBody, IgnoredInChats):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, max_length=1000)
    max_tokens: int | None = Field(None, ge=1, description="64 if left out")
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def length_parameter(self) -> str | None:
        """The field that set the number of tokens, if any."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens"
        return None if self.max_tokens is None else "max_tokens"
