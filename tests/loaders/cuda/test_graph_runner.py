"""The GPU's runner on a CPU, its steps replayed by ``RecordedGraphs``."""

import asyncio
from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from loaders.base import ModelSpec
from loaders.cuda import buckets
from loaders.cuda.graph_runner import GraphRunner
from loaders.cuda.memory import fitting_slots, spread
from loaders.cuda.step_graphs import Key
from loaders.errors import OutOfMemory
from loaders.runner import DeviceRunner
from server.engine.engine import Engine
from server.engine.sequence import SamplingParams
from tests import checkpoints
from tests.checkpoints import VOCABULARY
from tests.fakes import fake_model
from tests.loaders.runners.test_transformers_runner import reference, spec_of
from tests.recorded_graphs import RecordedGraphs

MAKERS = {"gpt2": checkpoints.gpt2, "llama": checkpoints.llama}
Make = Callable[[], PreTrainedModel]


def specified(model: PreTrainedModel, slots: int = 4, context: int = 256, steady: bool = True) -> ModelSpec:
    spec = spec_of(model, slots)
    checkpoint = spec.checkpoint
    whole = type(checkpoint)(**{**vars(checkpoint), "context_length": context})
    return ModelSpec(whole, slots=slots, batch_invariant=steady)


def continuation(runner: GraphRunner, slot: int, prompt: list[int], count: int) -> list[int]:
    logits = runner.prefill(slot, prompt)
    assert logits is not None
    found = [int(logits.argmax())]
    while len(found) < count:
        found.append(int(runner.decode([slot], found[-1:]).argmax()))
    runner.free(slot)
    return found


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("steady", [True, False])
def test_replayed_steps_give_the_tokens_of_generate(make: Make, steady: bool) -> None:
    model, graphs = make(), RecordedGraphs()
    runner = GraphRunner(model, specified(model, steady=steady), graphs)
    for slot, length in ((2, 5), (0, 140), (2, 9), (3, 16)):
        prompt = [(7 * i) % 300 + 5 for i in range(length)]
        assert continuation(runner, slot, prompt, 12) == reference(model, prompt, 12)
    assert runner.captured
    assert graphs.replays >= 4 * 12


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_replayed_and_plain_steps_compute_the_same(make: Make) -> None:
    model = make()
    captured = GraphRunner(model, specified(model), RecordedGraphs())
    plain = GraphRunner(model, specified(model), None, why_not="wanted so")
    for runner in (captured, plain):
        runner.prefill(0, [4] * 30)
        runner.prefill(1, [5, 6, 7])
    for tokens in ([8, 9], [10, 11], [12, 13]):
        torch.testing.assert_close(captured.decode([0, 1], tokens), plain.decode([0, 1], tokens))
    assert captured.report()["not_captured_because"] is None
    assert plain.report()["not_captured_because"] == "wanted so"
    assert not plain.captured


@pytest.mark.parametrize("steady", [True, False])
def test_a_row_is_independent_of_the_other_rows(steady: bool) -> None:
    """Slot 1 is in the middle of its prompt while the others decode; a freed slot is reused."""
    model = checkpoints.gpt2()
    runner = GraphRunner(model, specified(model, steady=steady), RecordedGraphs())
    prompt = list(range(20, 90))
    runner.prefill(0, [5] * 40)
    runner.prefill(1, prompt[:33], "none")
    runner.prefill(3, [6, 7])
    runner.decode([0, 3], [8, 9])
    runner.prefill(1, prompt[33:], "none")
    runner.decode([0, 3], [10, 11])
    runner.free(0)
    runner.prefill(0, [12] * 3)
    found = runner.decode([3, 1, 0], [13, 14, 15])  # any order
    held = {3: [6, 7, 9, 11, 13], 1: [*prompt, 14], 0: [12, 12, 12, 15]}
    for row, ids in zip(found, held.values(), strict=True):
        torch.testing.assert_close(row, runner.score(ids)[-1], atol=1e-4, rtol=1e-4)


def test_contexts_grow_from_one_captured_size_to_the_next() -> None:
    model = checkpoints.gpt2(context=600)
    runner = GraphRunner(model, specified(model, 2, 600), RecordedGraphs())
    assert buckets.contexts(600) == (256, 512, 608)
    ids = [(11 * i) % 310 + 2 for i in range(600)]
    whole = runner.score(ids)
    prefilled = runner.prefill(1, ids[:250], "all")
    assert prefilled is not None
    torch.testing.assert_close(prefilled, whole[:250], atol=1e-3, rtol=1e-3)
    together = runner.score_together([ids[:300], ids[300:]], 40)
    torch.testing.assert_close(together[0], whole[260:300], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(together[1], runner.score(ids[300:])[-40:], atol=1e-3, rtol=1e-3)
    for i in range(250, 262):
        torch.testing.assert_close(runner.decode([1], [ids[i]])[0], whole[i], atol=1e-3, rtol=1e-3)
    last = runner.prefill(1, ids[262:])
    assert last is not None
    torch.testing.assert_close(last[0], whole[-1], atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="do not fit"):
        runner.decode([1], [3])


def test_decoding_from_tokens_on_the_device() -> None:
    model = checkpoints.gpt2()
    runner = GraphRunner(model, specified(model), RecordedGraphs())
    for slot in (0, 2, 3):
        runner.prefill(slot, [30 + slot] * 4)
    found = runner.decode_from([3, 0], torch.tensor([7, 8]))
    for row, (slot, id_) in zip(found, ((3, 7), (0, 8)), strict=True):
        torch.testing.assert_close(row, runner.score([30 + slot] * 4 + [id_])[-1], atol=1e-4, rtol=1e-4)


def test_a_slot_with_nan_serves_the_next_sequence() -> None:
    model = checkpoints.gpt2()
    runner = GraphRunner(model, specified(model), RecordedGraphs())
    runner.prefill(1, [9] * 50)
    held = runner._cache
    assert held is not None
    held._all[:, :, 1, :50] = float("nan")
    runner.free(1)
    assert continuation(runner, 1, [40, 41], 6) == reference(model, [40, 41], 6)


@pytest.mark.parametrize("which", [1, 3])
def test_a_capture_that_fails_leaves_plain_steps_and_its_reason(which: int) -> None:
    model, graphs = checkpoints.gpt2(), RecordedGraphs({which: RuntimeError("not permitted\nin detail")})
    runner = GraphRunner(model, specified(model), graphs)
    assert continuation(runner, 0, [5, 6, 7], 8) == reference(model, [5, 6, 7], 8)
    assert runner.report()["captured"] is False
    assert runner.report()["not_captured_because"] == "RuntimeError: not permitted"
    assert graphs.captures == which
    assert not graphs.replays


def test_a_forward_pass_that_synchronizes_is_not_captured() -> None:
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=256, rope_parameters=rope,
        )
    ).eval()  # fmt: skip
    runner = GraphRunner(model, specified(model), RecordedGraphs())
    assert continuation(runner, 0, [5, 6, 7], 4) == reference(model, [5, 6, 7], 4)
    assert "not permitted when stream is capturing" in runner.report()["not_captured_because"]


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("steady", [True, False])
def test_an_engine_a_step_ahead_gives_the_tokens_of_generate(make: Make, steady: bool) -> None:
    """Seven prompts through four slots, in chunks, rows joining and leaving; some end unexpectedly."""
    model = make()
    prompts = [[5, 6, 7], [10] * 90, [3], list(range(20, 60)), [9, 8], [7] * 150, [200, 100, 50]]
    counts = [30, 12, 25, 8, 40, 5, 17]
    expected = [reference(model, p, n) for p, n in zip(prompts, counts, strict=True)]
    ends = frozenset({expected[0][11], expected[4][20]})

    async def run() -> list[list[int]]:
        loaded = fake_model()
        runner = GraphRunner(model, specified(model, steady=steady), RecordedGraphs())
        assert isinstance(runner, DeviceRunner)
        loaded.runner = runner
        engine = Engine(loaded, eos_ids=ends, prefill_chunk=48)
        await engine.start()

        async def one(prompt: list[int], count: int) -> list[int]:
            return [token.id async for token in engine.generate(prompt, SamplingParams(count))]

        found = await asyncio.gather(*(one(p, n) for p, n in zip(prompts, counts, strict=True)))
        await engine.stop()
        return list(found)

    for found, whole in zip(asyncio.run(run()), expected, strict=True):
        end = next((i + 1 for i, id_ in enumerate(whole) if id_ in ends), len(whole))
        assert found == whole[:end]


def test_a_failed_step_is_retried_at_the_same_positions() -> None:
    model = checkpoints.gpt2()
    runner = GraphRunner(model, specified(model), None)
    runner.prefill(0, [5, 6])
    runner.prefill(2, [7, 8, 9])
    run, broken = runner._run, [True]

    def fail_once(key: Key) -> None:
        run(key)
        if broken.pop() if broken else False:
            raise torch.OutOfMemoryError("CUDA out of memory")

    runner._run = fail_once  # type: ignore[method-assign]
    with pytest.raises(torch.OutOfMemoryError):
        runner.decode([0, 2], [11, 12])
    found = runner.decode([2, 0], [12, 11])
    for row, ids in zip(found, ([7, 8, 9, 12], [5, 6, 11]), strict=True):
        torch.testing.assert_close(row, runner.score(ids)[-1], atol=1e-4, rtol=1e-4)


def test_the_cache_is_counted_and_dropped() -> None:
    model = checkpoints.gpt2()
    runner = GraphRunner(model, specified(model), RecordedGraphs())
    assert runner.kv_cache_bytes == 2 * 2 * (4 + 1) * 256 * 64 * 4
    assert runner.token_bytes == 2 * 2 * 64 * 4
    assert runner.working_bytes == 4 * (4 + 1) * VOCABULARY + 8 * 256
    runner.close()
    assert runner.kv_cache_bytes == runner.working_bytes == 0
    with pytest.raises(RuntimeError, match="closed"):
        runner.prefill(0, [1])


def test_the_number_of_slots_fits_free_memory() -> None:
    model = checkpoints.gpt2()
    slot = 2 * 2 * 256 * 64 * 4
    runner = GraphRunner(model, specified(model), RecordedGraphs(), free=8 * slot)
    assert runner.slots == 2  # half of nine tenths holds three, one of which is for padding rows
    assert continuation(runner, 1, [5, 6], 4) == reference(model, [5, 6], 4)
    assert fitting_slots(4, slot, 3 * slot) == 1
    assert fitting_slots(4, slot, 100 * slot) == 4
    with pytest.raises(OutOfMemory, match="no room"):
        fitting_slots(4, slot, slot)


def test_recorded_graphs_behave_as_cuda_graphs() -> None:
    """A replay reads only tensors, none of the program's other state."""
    box, out, factor = [torch.zeros(2)], torch.zeros(2), [2.0]
    replay = RecordedGraphs().capture(lambda: out.copy_(box[0] * factor[0]))
    box[0].fill_(3.0)
    replay()
    assert out.tolist() == [6.0, 6.0]
    box[0], factor[0] = torch.ones(2), 100.0  # another tensor, another number: unseen
    replay()
    assert out.tolist() == [6.0, 6.0]
    with pytest.raises(RuntimeError, match="not permitted"):
        RecordedGraphs().capture(lambda: print(out.sum().item()))


def test_captured_sizes() -> None:
    assert buckets.batch_sizes(16, batch_invariant=False) == (1, 2, 4, 8, 16)
    assert buckets.batch_sizes(12, batch_invariant=False) == (1, 2, 4, 8, 12)
    assert buckets.batch_sizes(1, batch_invariant=False) == (1,)
    assert buckets.batch_sizes(64, batch_invariant=True) == (64,)
    assert buckets.contexts(1024) == (256, 512, 1024)
    assert buckets.contexts(100) == (112,)
    assert buckets.contexts(32768) == (256, 512, 1024, 2048, 8192, 32768)
    assert buckets.prompt_sizes(1024, batch_invariant=False) == (16, 32, 64, 128)
    assert buckets.prompt_sizes(1024, batch_invariant=True) == (128,)
    assert buckets.prompt_sizes(20, batch_invariant=False) == (16, 32)
    assert buckets.smallest((1, 2, 4), 3) == 4
    with pytest.raises(ValueError, match="more than"):
        buckets.smallest((1, 2, 4), 5)


def test_a_model_is_split_over_gpus_only_if_necessary() -> None:
    assert spread(70, [80]) == "cuda"
    assert spread(70, [80, 80]) == "cuda"
    assert spread(100, [80, 80]) == "auto"
