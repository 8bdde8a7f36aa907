"""``bitdial generate``: a continuation in the terminal, without a server."""

import asyncio
import sys
from collections.abc import Sequence
from contextlib import closing

from pydantic import Field
from pydantic_settings import CliPositionalArg

import loaders
from loaders.base import LoadedModel, ModelSpec
from loaders.end_tokens import with_end_token
from loaders.errors import LoaderError
from server.commands import FAILED, USAGE, UsageError, complain, for_saved, parse, require
from server.commands.progress import ProgressBars
from server.commands.sampling import PROMPT_HELP, STDIN, SamplingSettings, encode, read_prompt
from server.engine.engine import Engine
from server.errors import ServiceError
from server.host.threads import compute_with
from server.service.text.codec import TextCodec
from server.service.text_stream import TextStream
from server.settings.server import PrecisionSettings


class Options(SamplingSettings, PrecisionSettings):
    """Continue PROMPT with the model, in one precision, and show the text as it comes.

    Any sampling option turns sampling on; without one the continuation is greedy.
    """

    prompt: CliPositionalArg[str] = Field(STDIN, min_length=1, description=PROMPT_HELP)


def main(arguments: Sequence[str]) -> int:
    try:
        options = parse(Options, "generate", arguments)
        require([options.precision], options.resolved_device())
        return _generate(options, read_prompt(options.prompt, arguments))
    except UsageError as error:
        complain("generate", error)
        return USAGE
    except (LoaderError, ServiceError) as error:
        complain("generate", error)
        return FAILED


def _generate(options: Options, prompt: str) -> int:
    from loaders.checkpoint import (  # late: help must not wait for transformers
        load_tokenizer,
        open_checkpoint,
    )

    checkpoint = open_checkpoint(options.model_id, options.revision, ProgressBars(options.model_id))
    options = for_saved(options, checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    checkpoint, codec = with_end_token(checkpoint, tokenizer), TextCodec(tokenizer)
    spec = options.spec(checkpoint, slots=1)
    ids = encode(codec, prompt, options.max_new_tokens, spec.max_tokens, checkpoint.vocabulary)
    compute_with(options.resolved_threads())
    bars = ProgressBars(options.precision)
    try:
        # outside the event loop, which would continue the load after Ctrl-C
        model = loaders.load(options.precision, spec, bars)
    finally:
        bars.close()
    sys.stdout.write(prompt)
    sys.stdout.flush()
    return asyncio.run(_continue(model, spec, codec, ids, options))


async def _continue(
    model: LoadedModel, spec: ModelSpec, codec: TextCodec, ids: list[int], options: Options
) -> int:
    engine = Engine(model, eos_ids=spec.checkpoint.eos_ids, threads=spec.threads)
    await engine.start()
    try:
        return await _show(engine, codec, ids, options)
    finally:
        await engine.stop()


async def _show(engine: Engine, codec: TextCodec, ids: list[int], options: Options) -> int:
    with closing(TextStream(engine.generate(ids, options.params()), codec, ids)) as stream:
        async for chunk in stream.chunks():
            sys.stdout.write("".join(piece.text for piece in chunk))
            sys.stdout.flush()
    print()
    line = stream.timeline
    rate = f", {(line.tokens - 1) / line.decode_seconds:.1f} tokens/s" if line.decode_seconds else ""
    print(
        f"[{engine.precision}: {line.tokens} tokens, first after {line.prefill_seconds * 1000:.0f} ms{rate}]",
        file=sys.stderr,
    )
    return 0
