"""What was said so far, and how the next answer is sampled."""

from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class Sampling(BaseModel):
    """Sampling of the next answer; greedy unless temperature, top_k or top_p is set."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    max_new_tokens: int = Field(ge=1)
    temperature: float | None = Field(None, gt=0, le=2)
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = Field(None, gt=0, lt=1)
    seed: int | None = Field(None, ge=0, lt=2**64)

    def changed(self, name: str, value: str) -> "Sampling":
        """With one parameter replaced by what was typed; ``off`` unsets it.

        Raises:
            ValueError: there is no such parameter, or its value is invalid.
        """
        name = name.replace("-", "_")
        if name not in type(self).model_fields:
            raise ValueError(f"there is no {name}; there are {', '.join(type(self).model_fields)}")
        try:
            return type(self).model_validate(
                {**self.model_dump(), name: None if value.lower() in ("off", "none") else value}
            )
        except ValidationError as error:
            raise ValueError(f"{name}: {error.errors()[0]['msg']}") from None

    def shown(self) -> str:
        values = ((name, getattr(self, name)) for name in type(self).model_fields)
        return ", ".join(f"{name} {'off' if value is None else value}" for name, value in values)

    def fields(self) -> dict[str, Any]:
        """The parameters that are set, by the names that all routes have in common."""
        return self.model_dump(exclude={"max_new_tokens"}, exclude_none=True)

    @property
    def samples(self) -> bool:
        return any(value is not None for value in (self.temperature, self.top_k, self.top_p))


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    question: str
    answer: str
    precision: str


@dataclass
class Conversation:
    """The system message and the turns."""

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)

    def messages(self, question: str) -> list[dict[str, str]]:
        """All turns, then the question, as the chat route takes them."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        said = [
            {"role": role, "content": content}
            for turn in self.turns
            for role, content in (("user", turn.question), ("assistant", turn.answer))
        ]
        return [*system, *said, {"role": "user", "content": question}]

    def before_last(self) -> "Conversation":
        """This conversation without its last turn."""
        return replace(self, turns=self.turns[:-1])
