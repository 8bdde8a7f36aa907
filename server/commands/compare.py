"""``bitdial compare``: a prompt in several precisions, their texts beside the reference's."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from pydantic import Field
from pydantic_settings import CliPositionalArg

import loaders
from loaders.base import ModelSpec
from loaders.end_tokens import with_end_token
from loaders.errors import LoaderError
from loaders.quality.prompt import longest_prompt
from server.commands.command_line import FAILED, USAGE, UsageError, complain, parse, require
from server.commands.progress import ProgressBars
from server.commands.sampling import PROMPT_HELP, STDIN, SamplingSettings, encode, read_prompt
from server.commands.side_by_side import MARK, shown, side_by_side, wrapped
from server.engine.engine import Engine
from server.errors import ServiceError
from server.evaluation.comparison import Compared, Comparison, ComparisonRequest
from server.evaluation.comparison_table import HEADINGS, cells, figures
from server.host.threads import compute_with
from server.service.text.codec import TextCodec
from server.settings.output import NotSaved, Output, json_option, precisions_option, save
from server.settings.suited import for_suited
from server.settings.types import Precision, Precisions, listed, option
from server.tables import aligned
from server.terminal import folded, terminal_width

_WHAT, _MORE = "what is compared", "more"
_WIDEST = 160
_LEGEND = (
    "mean and max KL: divergence (nats) from {0}'s distributions after each prompt token;\n"
    "top-1: prompt tokens after which both have the same most probable token\n"
    "times are of this one run; see `bitdial report` for which precision is faster"
)


class Options(SamplingSettings):
    """Continue PROMPT in several precisions: speed, texts, distance from fp32."""

    prompt: CliPositionalArg[str] = Field(STDIN, min_length=1, description=PROMPT_HELP)
    precisions: Precisions | None = precisions_option(_WHAT)
    reference: Precision = option("fp32", _WHAT, "NAME", "the precision that the others are compared with")
    json_file: Output | None = json_option(_MORE, "write all figures and texts there", "nowhere")

    def names(self) -> tuple[str, ...]:
        """The reference, then the given precisions, or those this host can run."""
        names = listed(self.precisions, self.resolved_device())
        return tuple(dict.fromkeys((self.reference, *names)))


def main(arguments: Sequence[str]) -> int:
    try:
        options = parse(Options, "compare", arguments)
        require(options.names(), options.resolved_device())
        rows = asyncio.run(_compare(options, read_prompt(options.prompt, arguments)))
        _show(rows, shutil.get_terminal_size().columns)
        document = {"reference": options.reference, "precisions": {r.precision: figures(r) for r in rows}}
        save(options.json_file, json.dumps(document, ensure_ascii=False))
    except UsageError as error:
        complain("compare", error)
        return USAGE
    except (LoaderError, ServiceError, NotSaved) as error:
        complain("compare", error)
        return FAILED
    return 0


async def _compare(options: Options, prompt: str) -> list[Compared]:
    from loaders.checkpoint import (  # late: help must not wait for transformers
        load_tokenizer,
        open_checkpoint,
    )

    checkpoint = open_checkpoint(options.model_id, options.revision, ProgressBars(options.model_id))
    tokenizer = load_tokenizer(checkpoint)
    checkpoint, codec = with_end_token(checkpoint, tokenizer), TextCodec(tokenizer)
    spec = options.spec(checkpoint, slots=1)
    options = for_suited(options, spec)
    most = min(spec.max_tokens, longest_prompt(checkpoint.vocabulary) + options.max_new_tokens)
    ids = encode(codec, prompt, options.max_new_tokens, most, checkpoint.vocabulary)

    @asynccontextmanager
    async def use(name: str) -> AsyncIterator[Engine]:
        engine = await _started(name, spec, options.resolved_threads())
        try:
            yield engine
        finally:
            await engine.stop()

    comparison = Comparison(ComparisonRequest(ids, options.params()), codec, use)
    return [await comparison.run(name) for name in options.names()]


async def _started(name: str, spec: ModelSpec, threads: int) -> Engine:
    bars = ProgressBars(name, quiet=True)
    compute_with(threads)
    try:
        model = loaders.load(name, spec, bars)
    finally:
        bars.close()
    engine = Engine(model, eos_ids=spec.checkpoint.eos_ids, threads=threads)
    await engine.start()
    return engine


def _show(rows: Sequence[Compared], width: int) -> None:
    width = min(width, _WIDEST)
    reference, *others = rows
    print("\n".join(aligned([HEADINGS, *map(cells, rows)], terminal_width())))
    print("\n" + folded(_LEGEND.format(reference.precision)))
    print(f"\n{reference.precision} continues, {len(reference.written.ids)} tokens:\n")
    print("\n".join(wrapped(shown(reference.written.text), width)))
    for row in others:
        if row.first_divergence is None:
            print(f"\n{row.precision} continues with the same tokens.")
            continue
        print(f"\n{row.precision} differs from token {row.first_divergence} on ({MARK}):\n")
        titles = (reference.precision, row.precision)
        texts = (reference.written.text, row.written.text)
        print("\n".join(side_by_side(titles, texts, width)))
