"""Fields of OpenAI's and vLLM's bodies that change no response here, accepted with their default values only.

A client that sends defaults explicitly must not fail; one that requests a feature that isn't implemented must
be refused, or it would mistake a plain response for the requested one.
"""

import json
from typing import Annotated, Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, JsonValue
from pydantic_core import CoreSchema, core_schema

from server.http.validation import Strict


class Only:
    """Annotates a field that accepts null and ``accepted``, and refuses other values as not supported."""

    def __init__(self, *accepted: JsonValue) -> None:
        self._accepted = accepted

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._checked)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, JsonValue]:
        return {"enum": [None, *self._accepted]}

    def _checked(self, value: Any) -> Any:
        if value is None or any(_equal(value, one) for one in self._accepted):
            return value
        shown = " or ".join(json.dumps(one) for one in self._accepted)
        raise ValueError(f"not supported; only {shown} is accepted" if shown else "not supported")


def _equal(value: Any, accepted: JsonValue) -> bool:
    """Equality of JSON values: 1 equals 1.0, and true equals neither."""
    return isinstance(value, bool) == isinstance(accepted, bool) and bool(value == accepted)


OnlyNull = Annotated[Any, Only()]
OnlyFalse = Annotated[Any, Only(False)]
OnlyTrue = Annotated[Any, Only(True)]
OnlyEmpty = Annotated[Any, Only([])]
OnlyNoKeys = Annotated[Any, Only({})]
NoTool = Annotated[Any, Only("none", "auto")]


class IgnoredFields(Strict):
    """Ignored fields of completions and chat."""

    # labels, caches and accounting: any value, none affects the model
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    cache_salt: str | None = None
    service_tier: Annotated[Any, Only("auto", "default")] = None
    priority: Annotated[Any, Only(0)] = None

    # search and constraints
    use_beam_search: OnlyFalse = None
    early_stopping: OnlyFalse = None
    length_penalty: float | None = None  # used by beam search only
    allowed_token_ids: OnlyNull = None
    bad_words: OnlyEmpty = None
    logits_processors: OnlyEmpty = None
    vllm_xargs: OnlyNoKeys = None
    response_format: Annotated[Any, Only({"type": "text"})] = None
    structured_outputs: OnlyNull = None
    guided_json: OnlyNull = None
    guided_regex: OnlyNull = None
    guided_choice: OnlyNull = None
    guided_grammar: OnlyNull = None

    # input and output
    truncation_side: Annotated[Any, Only("left")] = None
    skip_special_tokens: OnlyTrue = None
    spaces_between_special_tokens: bool | None = None  # about special tokens, which are skipped
    include_stop_str_in_output: OnlyFalse = None
    prompt_logprobs: OnlyNull = None
    return_tokens_as_token_ids: OnlyFalse = None
    return_token_ids: OnlyFalse = None


class IgnoredInCompletions(IgnoredFields):
    """Ignored fields of ``POST /v1/completions``."""

    suffix: Annotated[Any, Only("")] = None
    add_special_tokens: OnlyTrue = None


class IgnoredInChats(IgnoredFields):
    """Ignored fields of ``POST /v1/chat/completions``."""

    tools: OnlyEmpty = None
    tool_choice: NoTool = None
    parallel_tool_calls: bool | None = None  # without tools it has no effect
    functions: OnlyEmpty = None
    function_call: NoTool = None
    reasoning_effort: Annotated[Any, Only("none")] = None
    verbosity: Annotated[Any, Only("medium")] = None
    modalities: Annotated[Any, Only(["text"])] = None
    audio: OnlyNull = None
    prediction: OnlyNull = None
    web_search_options: OnlyNull = None
    best_of: Annotated[Any, Only(1)] = None
    echo: OnlyFalse = None
    add_special_tokens: OnlyFalse = None
    add_generation_prompt: OnlyTrue = None
    continue_final_message: OnlyFalse = None
    chat_template: OnlyNull = None
    chat_template_kwargs: OnlyNoKeys = None
    documents: OnlyEmpty = None
