"""A prompt in several precisions through engines: compared with a direct computation, and under load."""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

import loaders
from loaders import kernels
from loaders.base import LoadedModel, ModelSpec
from loaders.checkpoint import load_tokenizer, open_checkpoint
from loaders.quality.prompt import longest_prompt
from server.engine.engine import Engine
from server.engine.sequence import SamplingParams
from server.errors import GenerationFailed
from server.evaluation.comparison import Comparison, ComparisonRequest, first_divergence
from server.observability.ended import Ended
from server.service.text.codec import TextCodec
from tests import checkpoints
from tests.conftest import until
from tests.fakes import FakeRunner, fake_model

PROMPT = "the other theatre and, in another one, the rain in the end"
CODEC = TextCodec(checkpoints.byte_tokenizer())


class Engines:
    """Engines by precision, created on first use."""

    def __init__(self, models: dict[str, LoadedModel], prefill_chunk: int = 16) -> None:
        self._models, self._chunk = models, prefill_chunk
        self.made: dict[str, Engine] = {}

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[Engine]:
        if name not in self.made:
            engine = Engine(self._models[name], eos_ids=frozenset({0}), prefill_chunk=self._chunk)
            self.made[name] = engine
            await engine.start()
        yield self.made[name]

    async def stop(self) -> None:
        for engine in self.made.values():
            await engine.stop()

    async def settled(self) -> None:
        await until(lambda: not any(e.running + e.waiting for e in self.made.values()))


def with_engines(
    models: dict[str, LoadedModel], test: Callable[[Engines], Awaitable[None]], prefill_chunk: int = 16
) -> None:
    async def main() -> None:
        engines = Engines(models, prefill_chunk)
        try:
            await test(engines)
            await engines.settled()
        finally:
            await engines.stop()

    asyncio.run(main())


def request(count: int = 12, prompt: str = PROMPT, stop: tuple[str, ...] = ()) -> ComparisonRequest:
    return ComparisonRequest(CODEC.encode(prompt), SamplingParams(max_new_tokens=count), stop)


def fakes(**precisions: FakeRunner) -> dict[str, LoadedModel]:
    return {name: fake_model(name, runner) for name, runner in precisions.items()}


def by_hand(reference: LoadedModel, model: LoadedModel, ids: list[int]) -> tuple[float, list[float], float]:
    p = reference.runner.score(ids).double().log_softmax(-1)
    q = model.runner.score(ids).double().log_softmax(-1)
    nll = -sum(float(q[at - 1, ids[at]]) for at in range(1, len(ids))) / (len(ids) - 1)
    kl = [float((p[at].exp() * (p[at] - q[at])).sum()) for at in range(len(ids))]
    same = sum(int(p[at].argmax()) == int(q[at].argmax()) for at in range(len(ids))) / len(ids)
    return math.exp(nll), kl, same


@pytest.mark.parametrize("prefill_chunk", [7, 128])
def test_figures_equal_the_direct_computation(tmp_path: Path, prefill_chunk: int) -> None:
    folder = checkpoints.save(checkpoints.gpt2(), tmp_path)
    spec = ModelSpec(open_checkpoint(str(folder)), slots=2)
    names = ("fp32", "dynamic-int8", "nf4")
    models = {name: loaders.load(name, spec) for name in names}
    ids = load_tokenizer(spec.checkpoint)(PROMPT)["input_ids"]
    near = 1e-5 if kernels.get() else 2e-3  # torch's kernels round a prompt in chunks differently
    expected = {name: by_hand(models["fp32"], models[name], ids) for name in names}

    async def check(engines: Engines) -> None:
        comparison = Comparison(request(), CODEC, engines.use)
        rows = [await comparison.run(name) for name in names]
        for row in rows:
            perplexity, kl, same = expected[row.precision]
            assert row.prompt.prompt_perplexity == pytest.approx(perplexity, rel=near)
            assert row.prompt.mean_kl == pytest.approx(sum(kl) / len(kl), rel=10 * near, abs=1e-9)
            assert row.prompt.max_kl == pytest.approx(max(kl), rel=10 * near, abs=1e-9)
            assert row.prompt.top1_agreement == pytest.approx(same)
            assert len(row.written.ids) == 12 or row.written.finish_reason == "eos_token"
            assert row.written.text == CODEC.decode(row.written.ids)
            assert row.first_divergence == first_divergence(rows[0].written.ids, row.written.ids)
            assert row.total_bytes == models[row.precision].footprint.weights_bytes + (
                models[row.precision].runner.kv_cache_bytes
            )
        full, *others = rows
        assert (full.prompt.mean_kl, full.prompt.max_kl, full.prompt.top1_agreement) == (0.0, 0.0, 1.0)
        assert full.first_divergence is None
        assert all(row.prompt.mean_kl > 0 for row in others)

    with_engines(models, check, prefill_chunk)


@pytest.mark.parametrize(
    ("one", "other", "index"),
    [
        ([1, 2, 3], [1, 2, 3], None),
        ([1, 2, 3], [1, 5, 3], 1),
        ([1, 2, 3], [1, 2], 2),
        ([1], [1, 2], 1),
        ([], [], None),
        ([], [4], 0),
    ],
)
def test_first_divergence(one: list[int], other: list[int], index: int | None) -> None:
    assert first_divergence(one, other) == first_divergence(other, one) == index


def test_running_sequences_continue_while_a_prompt_is_scored() -> None:
    """Its chunks are ordinary steps: a running stream gets a token in each."""
    runner = FakeRunner(slots=2)
    runner.delay = 0.002

    async def check(engines: Engines) -> None:
        async with engines.use("fp32") as engine:
            stream = engine.generate(CODEC.encode("ab"), SamplingParams(max_new_tokens=150))
            await anext(stream)
            comparison = Comparison(request(1, PROMPT * 3), CODEC, engines.use)
            before = stream.timeline.tokens
            await comparison.run("fp32")
            assert stream.timeline.tokens - before >= len(CODEC.encode(PROMPT * 3)) // 8
            stream.close()

    with_engines(fakes(fp32=runner), check, prefill_chunk=8)


def test_a_prompt_of_one_token_has_no_perplexity() -> None:
    async def check(engines: Engines) -> None:
        row = await Comparison(request(3, "a"), CODEC, engines.use).run("fp32")
        assert row.prompt.prompt_perplexity is None
        assert (row.prompt.mean_kl, row.prompt.top1_agreement) == (0.0, 1.0)

    with_engines(fakes(fp32=FakeRunner()), check)


def test_a_stop_string_ends_the_text() -> None:
    text = CODEC.decode(FakeRunner().expected(CODEC.encode(PROMPT), 12))
    stop = text[5:8]

    async def check(engines: Engines) -> None:
        row = await Comparison(request(12, PROMPT, (stop,)), CODEC, engines.use).run("fp32")
        assert row.written.text == text[: text.index(stop)]
        assert row.written.finish_reason == "stop_sequence"
        assert len(row.written.ids) == text.index(stop) + 3

    with_engines(fakes(fp32=FakeRunner()), check)


def test_generations_are_observed_and_scoring_is_not() -> None:
    observed: list[tuple[str, str, int, int]] = []

    def observe(ended: Ended) -> None:
        observed.append((ended.precision, ended.outcome, ended.timeline.tokens, ended.prompt_tokens))

    async def check(engines: Engines) -> None:
        comparison = Comparison(request(5), CODEC, engines.use, observe)
        await comparison.run("fp32")
        await comparison.run("int8")

    with_engines(fakes(fp32=FakeRunner(), int8=FakeRunner()), check)
    count = len(CODEC.encode(PROMPT))
    assert observed == [("fp32", "success", 5, count), ("int8", "success", 5, count)]


def test_a_failed_precision_is_named_and_the_next_one_runs() -> None:
    def broken(logits: Tensor, slots: object) -> Tensor:
        return torch.full_like(logits, math.nan) if len(logits) > 1 else logits

    bad = FakeRunner()
    bad.poison = broken

    async def check(engines: Engines) -> None:
        comparison = Comparison(request(5), CODEC, engines.use)
        with pytest.raises(GenerationFailed, match="int8: the model gives logits that are not numbers"):
            await comparison.run("int8")  # as the reference
        assert (await comparison.run("fp32")).prompt.mean_kl == 0.0
        with pytest.raises(GenerationFailed, match="int8: the model gives logits that are not numbers"):
            await comparison.run("int8")
        assert (await comparison.run("bf16")).prompt.mean_kl == 0.0
        await engines.settled()
        assert not bad.held

    with_engines(fakes(fp32=FakeRunner(), int8=bad, bf16=FakeRunner()), check)


def test_a_failing_observer_ends_its_sequence_only() -> None:
    async def check(engines: Engines) -> None:
        def fail(logits: Tensor) -> None:
            raise MemoryError

        async with engines.use("fp32") as engine:
            good = engine.generate([70, 71], SamplingParams(max_new_tokens=20))
            bad = engine.generate([72], SamplingParams(max_new_tokens=0), observe=fail)
            with pytest.raises(GenerationFailed, match="out of memory"):
                await anext(bad)
            assert [token.id async for token in good] == FakeRunner().expected([70, 71], 20)

    with_engines(fakes(fp32=FakeRunner()), check)


def test_a_cancelled_comparison_frees_its_slot() -> None:
    runner = FakeRunner(slots=1)
    runner.delay = 0.01

    async def check(engines: Engines) -> None:
        running = asyncio.create_task(Comparison(request(100), CODEC, engines.use).run("fp32"))
        await until(lambda: len(runner.batches) > 3)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await engines.settled()
        assert not runner.held

    with_engines(fakes(fp32=runner), check)


def test_the_kept_logits_of_a_reference_are_bounded() -> None:
    assert longest_prompt(50_257) == 5341
    assert longest_prompt(2**40) == 1
