"""``bitdial generate``: a continuation in the terminal, without a server."""

import asyncio
import sys
from collections.abc import Sequence
from typing import Any

from pydantic import Field
from pydantic_settings import CliPositionalArg

import loaders
from loaders.base import LoaderError
from server.commands import FAILED, USAGE, UsageError, complain, parse, require
from server.commands.progress import ProgressBars
from server.engine import Engine
from server.sequence import SamplingParams
from server.settings import PrecisionSettings, option
from server.text import TextCodec

_GENERATION = "generation"


class Options(PrecisionSettings):
    """Continue PROMPT with the model, in one precision, and show the text as it comes.

    Any sampling option turns sampling on; without one the continuation is greedy.
    """

    prompt: CliPositionalArg[str] = Field(min_length=1, description="the text to continue")
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


def main(arguments: Sequence[str]) -> int:
    try:
        return asyncio.run(_generate(parse(Options, "generate", arguments)))
    except UsageError as error:
        complain("generate", error)
        return USAGE
    except LoaderError as error:
        complain("generate", error)
        return FAILED


async def _generate(options: Options) -> int:
    require([options.precision], options.resolved_device())
    from loaders.checkpoint import load_tokenizer, open_checkpoint  # late: help needn't wait for transformers

    bars = ProgressBars(options.precision)
    checkpoint = open_checkpoint(options.model_id, options.revision, bars)
    spec = options.spec(checkpoint, slots=1)
    codec = TextCodec(load_tokenizer(checkpoint))
    ids = codec.encode(options.prompt)
    if len(ids) + options.max_new_tokens > spec.max_tokens:
        raise UsageError(
            f"{len(ids)} prompt tokens and --max-new-tokens {options.max_new_tokens} exceed the "
            f"model's context of {spec.max_tokens}"
        )
    model = loaders.load(options.precision, spec, bars)
    bars.close()
    engine = Engine(model, eos_ids=checkpoint.eos_ids, threads=options.threads)
    await engine.start()
    try:
        return await _show(engine, codec, ids, options)
    finally:
        await engine.stop()


async def _show(engine: Engine, codec: TextCodec, ids: list[int], options: Options) -> int:
    chosen: dict[str, Any] = {name: getattr(options, name) for name in ("top_k", "top_p")}
    sample = options.temperature is not None or any(value is not None for value in chosen.values())
    generation = engine.generate(
        ids,
        SamplingParams(
            options.max_new_tokens,
            do_sample=sample,
            temperature=options.temperature or 1.0,
            seed=options.seed,
            **chosen,
        ),
    )
    decoder = codec.incremental(ids)
    sys.stdout.write(options.prompt)
    async for token in generation:
        sys.stdout.write(decoder.push(token.id))
        sys.stdout.flush()
    print(decoder.finish())
    line = generation.timeline
    rate = f", {(line.tokens - 1) / line.decode_seconds:.1f} tokens/s" if line.decode_seconds else ""
    print(
        f"[{engine.precision}: {line.tokens} tokens, first after {line.prefill_seconds * 1000:.0f} ms{rate}]",
        file=sys.stderr,
    )
    return 0
