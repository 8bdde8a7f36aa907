"""``bitdial generate``: a continuation in the terminal, without a server."""

import asyncio
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, BeforeValidator, Field
from pydantic_settings import CliPositionalArg

import loaders
from loaders.base import LoadedModel, ModelSpec
from loaders.end_tokens import with_end_token
from loaders.errors import LoaderError
from server.commands.command_line import FAILED, USAGE, UsageError, complain, for_saved, parse, require
from server.commands.progress import ProgressBars
from server.commands.sampling import (
    PROMPT_HELP,
    STDIN,
    SamplingSettings,
    encode,
    read_prompt,
    read_prompt_file,
)
from server.engine.engine import Engine
from server.errors import ServiceError
from server.host.threads import compute_with
from server.service.text.codec import TextCodec
from server.service.text_stream import TextStream
from server.settings.server import PrecisionSettings
from server.settings.types import TextFile, option, parse_names

_IO = "input and output"


class Options(SamplingSettings, PrecisionSettings):
    """Continue PROMPT with the model, in one precision, and show the text as it comes.

    Any sampling option turns sampling on; without one the continuation is greedy.
    """

    prompt: CliPositionalArg[str] = Field(STDIN, min_length=1, description=PROMPT_HELP)
    file: Annotated[tuple[TextFile, ...] | str, BeforeValidator(parse_names)] = option(
        (), _IO, "FILES", "continue the text of each of these files, by comma", unset="PROMPT is continued"
    )
    json_lines: bool = option(
        False,
        _IO,
        None,
        "print one JSON object for each prompt: text, token ids, times",
        validation_alias=AliasChoices("json_lines", "json"),
    )


@dataclass(frozen=True)
class _Prompt:
    file: str | None
    """The name that was given; None for an argument and standard input."""
    text: str


def main(arguments: Sequence[str]) -> int:
    try:
        options = parse(Options, "generate", arguments)
        require([options.precision], options.resolved_device())
        return _generate(options, _prompts(options, arguments))
    except UsageError as error:
        complain("generate", error)
        return USAGE
    except (LoaderError, ServiceError) as error:
        complain("generate", error)
        return FAILED


def _prompts(options: Options, arguments: Sequence[str]) -> list[_Prompt]:
    if not options.file:
        return [_Prompt(None, read_prompt(options.prompt, arguments))]
    if options.prompt != STDIN:
        raise UsageError("either PROMPT or --file")
    return [_Prompt(str(file), read_prompt_file(file)) for file in map(Path, options.file)]


def _generate(options: Options, prompts: Sequence[_Prompt]) -> int:
    from loaders.checkpoint import (  # late: help must not wait for transformers
        load_tokenizer,
        open_checkpoint,
    )

    checkpoint = open_checkpoint(options.model_id, options.revision, ProgressBars(options.model_id))
    options = for_saved(options, checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    checkpoint, codec = with_end_token(checkpoint, tokenizer), TextCodec(tokenizer)
    spec = options.spec(checkpoint, slots=1)
    ids = [_encode(codec, prompt, options, spec) for prompt in prompts]
    compute_with(options.resolved_threads())
    bars = ProgressBars(options.precision, quiet=True)
    try:
        # outside the event loop, which would continue the load after Ctrl-C
        model = loaders.load(options.precision, spec, bars)
    finally:
        bars.close()
    return asyncio.run(_continue(model, spec, codec, list(zip(prompts, ids, strict=True)), options))


def _encode(codec: TextCodec, prompt: _Prompt, options: Options, spec: ModelSpec) -> list[int]:
    try:
        return encode(codec, prompt.text, options.max_new_tokens, spec.max_tokens, spec.checkpoint.vocabulary)
    except UsageError as error:
        raise error if prompt.file is None else UsageError(f"{prompt.file}: {error}") from None


async def _continue(
    model: LoadedModel,
    spec: ModelSpec,
    codec: TextCodec,
    prompts: Sequence[tuple[_Prompt, list[int]]],
    options: Options,
) -> int:
    engine = Engine(model, eos_ids=spec.checkpoint.eos_ids, threads=spec.threads)
    await engine.start()
    try:
        for index, (prompt, ids) in enumerate(prompts):
            with closing(TextStream(engine.generate(ids, options.params()), codec, ids)) as stream:
                if options.json_lines:
                    await stream.run()
                    print(json.dumps(_figures(prompt, stream, options), ensure_ascii=False), flush=True)
                    continue
                if len(prompts) > 1:  # as head and tail separate their files
                    print(f"{chr(10) * (index > 0)}==> {prompt.file} <==")
                await _show(prompt.text, stream, engine.precision)
    finally:
        await engine.stop()
    return 0


async def _show(prompt: str, stream: TextStream, precision: str) -> None:
    sys.stdout.write(prompt)
    sys.stdout.flush()
    async for chunk in stream.chunks():
        sys.stdout.write("".join(piece.text for piece in chunk))
        sys.stdout.flush()
    print(flush=True)
    line = stream.timeline
    rate = f", {(line.tokens - 1) / line.decode_seconds:.1f} tokens/s" if line.decode_seconds else ""
    print(
        f"[{precision}: {line.tokens} tokens, first after {line.prefill_seconds * 1000:.0f} ms{rate}]",
        file=sys.stderr,
    )


def _figures(prompt: _Prompt, stream: TextStream, options: Options) -> dict[str, Any]:
    line = stream.timeline
    return {
        "file": prompt.file,
        "generated_text": stream.text,
        "precision": options.precision,
        "finish_reason": stream.finish_reason,
        "seed": options.seed if options.params().do_sample else None,
        "prompt_tokens": len(stream.prompt_ids),
        "generated_tokens": line.tokens,
        "token_ids": [piece.token.id for piece in stream.pieces],
        "timings": {
            "prefill_ms": round(line.prefill_seconds * 1000, 3),
            "decode_ms": round(line.decode_seconds * 1000, 3),
        },
    }
