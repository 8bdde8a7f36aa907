"""Decisions for a GPU, tested without one: the runner, the size of its cache, types, reported reasons."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from loaders.base import LoadedModel, ModelSpec, Progress
from loaders.cuda.graph_runner import GraphRunner
from loaders.cuda.memory import device_map, smallest_cache
from loaders.errors import OutOfMemory
from loaders.precisions import bnb, full
from loaders.runners import select as runners
from loaders.runners.sequential_runner import SequentialRunner
from loaders.runners.transformers_runner import TransformersRunner
from server.errors import NotReady
from server.host import memory
from server.lifecycle import Lifecycle
from server.observability.metrics import Metrics
from server.service.pool import Pool
from server.settings.server import Settings
from tests import checkpoints
from tests.fakes import FakeDeviceRunner, fake_checkpoint, fake_load, fake_model
from tests.loaders.cuda.test_graph_runner import specified
from tests.loaders.test_families import GATED, LOCAL, SIZES
from tests.recorded_graphs import RecordedGraphs

SLOT = 2 * 2 * 256 * 64 * 4
"""Bytes of a slot of the small GPT-2: layers, keys and values, columns, width, float32."""


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Simulates a GPU with so many bytes free; its graphs are recorded ones."""

    def have(free: int) -> None:
        monkeypatch.setattr(runners, "card_free", lambda _: free)
        monkeypatch.setattr(runners, "CudaGraphs", lambda _: RecordedGraphs())

    return have


def spec_for(model: PreTrainedModel, **values: Any) -> ModelSpec:
    return replace(specified(model), device="cuda", **values)


def test_the_cache_is_as_large_as_free_memory_allows(card: Callable[[int], None]) -> None:
    model = checkpoints.gpt2()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    card(1000 * SLOT)
    assert runners.runner_for(model, spec_for(model)).slots == 4
    assert runners.runner_for(model, spec_for(model, room=weights + 8 * SLOT)).slots == 2
    card(6 * SLOT)
    assert runners.runner_for(model, spec_for(model)).slots == 1
    with pytest.raises(OutOfMemory, match="MAX_TOTAL_TOKENS"):
        runners.runner_for(model, spec_for(model, room=weights + SLOT))


def test_the_runner_and_the_reason_for_not_capturing(card: Callable[[int], None]) -> None:
    card(1000 * SLOT)
    model = checkpoints.gpt2()
    captured = runners.runner_for(model, spec_for(model))
    assert isinstance(captured, GraphRunner)
    captured.prefill(0, [1])
    assert captured.report()["captured"] is True
    plain = runners.runner_for(model, spec_for(model, cuda_graphs=False))
    assert isinstance(plain, GraphRunner)
    plain.prefill(0, [1])
    assert plain.report()["captured"] is False
    assert plain.report()["not_captured_because"] == "CUDA_GRAPHS is off"
    spread = checkpoints.gpt2()
    spread.hf_device_map = {"transformer": 0, "lm_head": 1}
    several = runners.runner_for(spread, spec_for(spread))
    assert isinstance(several, TransformersRunner)
    assert several.report()["not_captured_because"] == "the model is spread over 2 devices"


def test_an_outlier_threshold_prevents_capture_of_int8_and_the_cost_is_reported(
    card: Callable[[int], None],
) -> None:
    card(1000 * SLOT)
    model = checkpoints.gpt2()
    model.is_loaded_in_8bit = True
    assert runners.runner_for(model, spec_for(model)).report()["not_captured_because"] is None  # type: ignore[attr-defined]
    reason = runners.runner_for(model, spec_for(model, int8_threshold=6.0)).report()["not_captured_because"]  # type: ignore[attr-defined]
    assert "waits for the host" in reason
    assert "beside a sequence changes its tokens" in reason


def test_an_architecture_that_cannot_be_batched_is_found_on_a_gpu_too(card: Callable[[int], None]) -> None:
    """GPT-Neo's local layers derive their mask from the length of the cache, here that of a captured step."""
    card(10**9)
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt_neo", **SIZES, **LOCAL)
    model = AutoModelForCausalLM.from_config(config).eval()
    found = runners.runner_for(model, replace(specified(model, context=128), device="cuda"))
    assert isinstance(found, SequentialRunner)
    assert "can't be batched here: its rows disturb each other" in found.report()["not_batched_because"]
    config = AutoConfig.for_model("lfm2", **GATED, layer_types=["conv", "full_attention"])
    model = AutoModelForCausalLM.from_config(config).eval()
    found = runners.runner_for(model, replace(specified(model, context=128), device="cuda"))
    assert isinstance(found, TransformersRunner)
    assert found.report()["not_captured_because"] == "it has conv layers"
    llama = checkpoints.llama()
    runner = runners.runner_for(llama, spec_for(llama))
    assert isinstance(runner, GraphRunner)
    assert not runner.captured  # that is for the thread that makes all calls
    runner.prefill(0, [1])
    assert runner.captured


def test_settings_reach_the_loader(tmp_path: Path) -> None:
    settings = Settings(device="cpu", cuda_graphs=False, batch_invariant=False, int8_threshold=6.0)
    spec = settings.spec(fake_checkpoint(tmp_path), slots=3)
    assert (spec.cuda_graphs, spec.batch_invariant, spec.int8_threshold, spec.slots) == (False, False, 6.0, 3)
    assert Settings(device="cpu").spec(fake_checkpoint(tmp_path), 1).cuda_graphs


def test_the_smallest_configuration_that_runs() -> None:
    gpt2 = GPT2Config(n_embd=64, n_layer=2, n_head=2)
    assert smallest_cache(gpt2, 250) == 2 * SLOT
    shared = LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    assert smallest_cache(shared, 256) == SLOT


def test_a_model_that_does_not_fit_one_gpu_with_its_cache_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_for(checkpoints.gpt2())
    monkeypatch.setattr("loaders.cuda.memory.cards_free", lambda: [10 * SLOT, 10 * SLOT])
    assert device_map(spec, 6 * SLOT) == "cuda"
    assert device_map(spec, 8 * SLOT) == "auto"
    assert device_map(replace(spec, device="cpu"), 8 * SLOT) == "cpu"


def test_fp32_is_computed_without_tf32() -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        full.disable_tf32()
        assert not torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_four_bits_are_computed_in_a_type_of_the_gpu(
    monkeypatch: pytest.MonkeyPatch, native: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: native)
    spec = spec_for(checkpoints.gpt2(), double_quantization=True)
    config = bnb.quantization_config("nf4", spec)
    assert config.bnb_4bit_compute_dtype == bnb.rest_dtype("nf4", spec) == expected
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)
    assert not bnb.quantization_config(
        "fp4", replace(spec, double_quantization=False)
    ).bnb_4bit_use_double_quant
    assert bnb.rest_dtype("int8", spec) == torch.float16


class Loads:
    """Replaces ``loaders.load``; its models have a megabyte of weights and a device's working memory."""

    def __init__(self) -> None:
        self.rooms: list[int | None] = []
        self.starting = self.most_at_once = 0

    def __call__(self, precision: str, spec: ModelSpec, progress: Progress) -> LoadedModel:
        self.rooms.append(spec.room)
        runner = FakeDeviceRunner(2, 64)
        self.starting += 1
        self.most_at_once = max(self.most_at_once, self.starting)

        def warm(_: Sequence[int]) -> None:
            runner.on_decode = lambda _: None
            self.starting -= 1

        runner.on_decode = warm
        model = fake_model(precision, runner)
        return replace(model, footprint=replace(model.footprint, weights_bytes=10**6))


def with_pool(folder: Path, test: Callable[[Pool], Any], load: Any = fake_load, **options: Any) -> None:
    async def main() -> None:
        settings = Settings(device="cpu", **options)
        pool = Pool(
            fake_checkpoint(folder), settings, load=load, metrics=Metrics("fake"), lifecycle=Lifecycle()
        )
        try:
            await test(pool)
        finally:
            await pool.stop()

    asyncio.run(main())


def test_the_budget_is_what_is_left_of_it_and_working_memory_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = Loads()
    monkeypatch.setattr(memory, "needed_bytes", lambda *_: 10**6)
    each = 10**6 + 2 * 64 * 8 + FakeDeviceRunner.working_bytes

    async def check(pool: Pool) -> None:
        for name in ("fp32", "bf16"):
            async with pool.use(name):
                pass
        assert pool.host.used_bytes() == 2 * each
        with pytest.raises(NotReady, match="no room"):
            async with pool.use("fp32"), pool.use("bf16"), pool.use("fp16"):
                pass

    with_pool(tmp_path, check, loads, memory_budget=2_900_000)
    assert loads.rooms == [2_900_000, 2_900_000 - each]


def test_engines_capture_one_at_a_time(tmp_path: Path) -> None:
    """Memory that an engine allocates at its start is counted by the next one."""
    loads = Loads()

    async def check(pool: Pool) -> None:
        async def use(name: str) -> None:
            async with pool.use(name):
                pass

        await asyncio.gather(*(use(name) for name in ("fp32", "bf16", "fp16")))

    with_pool(tmp_path, check, loads)
    assert loads.most_at_once == 1


def test_the_estimate_for_a_gpu_includes_a_cache(tmp_path: Path) -> None:
    checkpoint = fake_checkpoint(tmp_path)
    on_cpu, on_cuda = ModelSpec(checkpoint), ModelSpec(checkpoint, device="cuda")
    cache = memory.needed_bytes("fp32", on_cuda) - memory.needed_bytes("fp32", on_cpu)
    assert cache == smallest_cache(checkpoint.config, checkpoint.context_length) > 0
