"""Shared by the commands that continue a prompt: sampling options, and encoding within the context."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loaders.tokenizer_faults import unknown_token
from server.commands.command_line import UsageError
from server.engine.sequence import SamplingParams
from server.service.text.codec import TextCodec
from server.settings.server import ModelSettings
from server.settings.types import option

_GENERATION = "generation"
STDIN = "-"
PROMPT_HELP = "the text to continue; -, or none: read from standard input"


class SamplingSettings(ModelSettings):
    """Any sampling option turns sampling on; without one the continuation is greedy."""

    max_new_tokens: int = option(64, _GENERATION, "N", "most tokens to generate", ge=1)
    temperature: float | None = option(
        None, _GENERATION, "X", "sample; higher is more random", unset="1 if sampling", gt=0, le=100
    )
    top_k: int | None = option(
        None, _GENERATION, "N", "sample among the N most probable tokens", unset="all", ge=1
    )
    top_p: float | None = option(
        None, _GENERATION, "X", "sample within this probability mass", unset="all", gt=0, lt=1
    )
    seed: int = option(0, _GENERATION, "N", "of the random stream", ge=0, lt=2**64)

    def params(self) -> SamplingParams:
        chosen: dict[str, Any] = {name: getattr(self, name) for name in ("top_k", "top_p")}
        samples = self.temperature is not None or any(value is not None for value in chosen.values())
        return SamplingParams(
            self.max_new_tokens,
            do_sample=samples,
            temperature=self.temperature or 1.0,
            seed=self.seed,
            **chosen,
        )


def read_prompt(given: str, arguments: Sequence[str]) -> str:
    """The prompt: ``given``, or all of standard input for ``-``, without its final newline.

    Args:
        arguments: the command line, since the parser treats an empty PROMPT as missing.

    Raises:
        UsageError: the prompt is empty, or standard input is not UTF-8.
    """
    if given == STDIN and STDIN not in arguments and arguments and arguments[-1] == "":
        raise UsageError("PROMPT is empty")
    if given != STDIN:
        return given
    if sys.stdin.isatty():
        print("reading the prompt from the terminal; end it with Ctrl-D", file=sys.stderr)
    try:
        prompt = sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError:
        raise UsageError("standard input is not UTF-8") from None
    if not prompt:
        raise UsageError("standard input is empty")
    return prompt


def read_prompt_file(file: Path) -> str:
    """A file's text without its final newline.

    Raises:
        UsageError: it can't be read, is empty, or is not UTF-8.
    """
    try:
        prompt = file.read_text(encoding="utf-8").removesuffix("\n")
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{file} is not UTF-8") from None
    if not prompt:
        raise UsageError(f"{file} is empty")
    return prompt


def encode(codec: TextCodec, prompt: str, max_new_tokens: int, context: int, vocabulary: int) -> list[int]:
    """The prompt's ids.

    Args:
        context: maximum tokens of prompt and continuation.
        vocabulary: ids are below it.

    Raises:
        UsageError: prompt and continuation exceed the context.
    """
    ids = codec.encode(prompt)
    if not ids:
        raise UsageError("the prompt has no tokens")
    if (why := unknown_token(ids, vocabulary, "the prompt")) is not None:
        raise UsageError(why)
    if len(ids) + max_new_tokens > context:
        raise UsageError(
            f"{len(ids)} prompt tokens and --max-new-tokens {max_new_tokens} exceed the "
            f"model's context of {context}"
        )
    return ids
