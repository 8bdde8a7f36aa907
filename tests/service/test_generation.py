import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack, aclosing, closing
from pathlib import Path
from typing import Any

import pytest

from server.engine.engine import Engine
from server.engine.sequence import SamplingParams
from server.errors import (
    BadPrecision,
    GenerationFailed,
    Invalid,
    NotReady,
    Overloaded,
    PromptTooLong,
    Unavailable,
)
from server.lifecycle import Lifecycle
from server.service.admission import Places
from server.service.generation import Continuation, GenerationRequest, GenerationService
from server.service.precision_state import Lease, PrecisionState
from server.service.text.codec import TextCodec
from server.settings.server import Settings
from tests.checkpoints import byte_tokenizer
from tests.conftest import PATIENCE, until
from tests.fakes import FakeRunner, Outcomes, fake_checkpoint, fake_model


class OneEngine:
    """A pool of fp32 only; nf4 is known but unavailable."""

    default = "fp32"

    def __init__(self, engine: Engine) -> None:
        self.engine, self.state = engine, PrecisionState("fp32", "loaded", engine=engine)

    def drain_seconds(self) -> float | None:
        return self.engine.drain_seconds()

    def engine_rests(self) -> bool:
        return not self.engine.running + self.engine.waiting

    def use(self, precision: str) -> Lease:
        if precision != "fp32":
            return Lease(PrecisionState(precision, "unavailable"), self._refuse)
        return Lease(self.state, self._refuse)

    async def _refuse(self, state: PrecisionState) -> Engine:
        raise Unavailable(f"{state.name} needs a card")

    @property
    def users(self) -> int:
        return self.state.users


class House:
    def __init__(
        self, service: GenerationService, runner: FakeRunner, pool: OneEngine, outcomes: Outcomes
    ) -> None:
        self.service, self.runner, self.pool, self.outcomes = service, runner, pool, outcomes
        self.lifecycle = Lifecycle()

    def nothing_is_held(self) -> bool:
        return not self.service.places.in_flight and not self.pool.users


def with_service(folder: Path, test: Callable[[House], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        runner, settings, codec = FakeRunner(), Settings(**options), TextCodec(byte_tokenizer())
        engine = Engine(fake_model(runner=runner), eos_ids=frozenset({0}))
        await engine.start()
        pool, outcomes, lifecycle = OneEngine(engine), Outcomes(), Lifecycle()
        places = Places(settings.max_concurrent_requests, lifecycle, pool, outcomes)
        service = GenerationService(settings, fake_checkpoint(folder), codec, pool, outcomes, places, None)
        house = House(service, runner, pool, outcomes)
        house.lifecycle = lifecycle
        try:
            await test(house)
            assert house.nothing_is_held()
        finally:
            await engine.stop()

    asyncio.run(main())


async def open_one(house: House, request: GenerationRequest) -> Continuation:
    """Holds nothing if it raises; the caller closes what it returns."""
    with ExitStack() as held:
        (opened,) = await house.service.open_all([request], held)
        held.pop_all()
    return opened


async def complete(house: House, **request: Any) -> Continuation:
    with closing(await open_one(house, GenerationRequest(**request))) as continuation:
        return await continuation.run()


def test_text_comes_in_pieces_that_join(tmp_path: Path) -> None:
    async def check(house: House) -> None:
        done = await complete(house, prompt="abc", max_new_tokens=12)
        ids = house.service.codec.encode("abc")
        assert done.text == house.service.codec.decode(house.runner.expected(ids, 12))
        assert [piece.index for piece in done.pieces] == list(range(1, 13))
        assert (done.finish_reason, done.precision, done.prompt_ids) == ("length", "fp32", ids)
        assert house.outcomes.seen == [("fp32", "success", 3)]

    with_service(tmp_path, check)


def test_a_stop_string_ends_the_text_and_is_not_part_of_it(tmp_path: Path) -> None:
    async def check(house: House) -> None:
        whole = (await complete(house, prompt="abc", max_new_tokens=12)).text
        stop = whole[5:7]
        done = await complete(house, prompt="abc", max_new_tokens=12, stop=(stop,))
        assert done.text == whole[: whole.index(stop)]
        assert done.finish_reason == "stop_sequence"

    with_service(tmp_path, check)


def test_the_default_length_is_64_or_what_is_left(tmp_path: Path) -> None:
    async def check(house: House) -> None:
        assert len((await complete(house, prompt="abc")).pieces) == 64
        assert len((await complete(house, prompt=[70] * 250)).pieces) == 6

    with_service(tmp_path, check)


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ({"prompt": ""}, Invalid),
        ({"prompt": []}, Invalid),
        ({"prompt": [320]}, Invalid),
        ({"prompt": [-1]}, Invalid),
        ({"prompt": [70] * 256}, PromptTooLong),
        ({"prompt": [70] * 200, "max_new_tokens": 57}, PromptTooLong),
        ({"prompt": "a", "precision": "int3"}, BadPrecision),
        ({"prompt": "a", "precision": "nf4"}, Unavailable),
    ],
)
def test_a_refused_request_holds_no_resources(
    tmp_path: Path, request_: dict[str, Any], error: type[Exception]
) -> None:
    async def check(house: House) -> None:
        with pytest.raises(error):
            await open_one(house, GenerationRequest(**request_))
        assert house.nothing_is_held()
        assert (await complete(house, prompt="abc", max_new_tokens=2)).finish_reason == "length"

    with_service(tmp_path, check)


def test_a_tokenizer_that_fails_on_the_prompt_leaves_nothing_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise GenerationFailed("the model's tokenizer fails to decode these tokens")

    async def check(house: House) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(house.service.codec, "incremental", fail)
            with pytest.raises(GenerationFailed):
                await open_one(house, GenerationRequest("abc"))
        assert house.nothing_is_held()
        await until(house.pool.engine_rests)
        assert house.outcomes.seen == [("fp32", GenerationFailed.error_type, 0)]

    with_service(tmp_path, check)


def test_truncate_keeps_the_last_tokens(tmp_path: Path) -> None:
    async def check(house: House) -> None:
        done = await complete(house, prompt=list(range(60, 90)), truncate=4, max_new_tokens=1)
        assert done.prompt_ids == [86, 87, 88, 89]

    with_service(tmp_path, check)


def test_a_fallback_is_reported(tmp_path: Path) -> None:
    async def check(house: House) -> None:
        done = await complete(house, prompt="a", precision="nf4", fallback=True, max_new_tokens=1)
        assert (done.precision, done.precision_requested) == ("fp32", "nf4")
        assert done.fallback_reason == "nf4 needs a card"

    with_service(tmp_path, check)


def test_places_are_counted_and_released(tmp_path: Path) -> None:
    async def check(house: House) -> None:
        house.runner.delay = 0.005
        requests = [GenerationRequest("abc", max_new_tokens=50)] * 2
        with ExitStack() as held:
            opened = await house.service.open_all(requests, held)
            with pytest.raises(Overloaded):
                await house.service.open_all(requests, held)
            opened[0].close()
            third = await open_one(house, GenerationRequest("abc", max_new_tokens=1))
        third.close()
        third.close()
        assert [outcome for _, outcome, _ in house.outcomes.seen] == ["overloaded"] * 2 + ["cancelled"] * 3

    with_service(tmp_path, check, max_concurrent_requests=2)


def test_all_or_none(tmp_path: Path) -> None:
    async def check(house: House) -> None:
        with pytest.raises(Invalid), ExitStack() as held:
            await house.service.open_all([GenerationRequest("abc"), GenerationRequest("")], held)

    with_service(tmp_path, check)


def test_a_draining_server_takes_nothing_new(tmp_path: Path) -> None:
    async def check(house: House) -> None:
        house.lifecycle.drain()
        with pytest.raises(NotReady):
            await open_one(house, GenerationRequest("abc"))

    with_service(tmp_path, check)


def test_a_drawn_seed_is_reported_and_repeats(tmp_path: Path) -> None:
    async def check(house: House) -> None:
        params = SamplingParams(max_new_tokens=1, do_sample=True, temperature=4.0)
        first = await complete(house, prompt="abc", params=params, max_new_tokens=20)
        again = await complete(house, prompt="abc", params=params, max_new_tokens=20, seed=first.seed)
        other = await complete(house, prompt="abc", params=params, max_new_tokens=20)
        assert again.text == first.text
        assert other.seed != first.seed
        assert other.text != first.text

    with_service(tmp_path, check)


def test_a_slow_reader_gets_all_available_text_at_once(tmp_path: Path) -> None:
    async def test(house: House) -> None:
        whole = await complete(house, prompt=[65, 66], max_new_tokens=12)
        gate = threading.Event()

        def held(slots: Sequence[int]) -> None:
            gate.wait(PATIENCE)

        house.runner.on_decode = held
        continuation = await open_one(house, GenerationRequest(prompt=[65, 66], max_new_tokens=12))
        chunks = []
        async with aclosing(continuation.chunks()) as coming:
            async for chunk in coming:
                chunks.append(chunk)
                gate.set()
                await until(house.pool.engine_rests)
        assert len(chunks) == 2
        assert [piece.index for chunk in chunks for piece in chunk] == list(range(1, 13))
        assert [piece.token.id for piece in continuation.pieces] == [p.token.id for p in whole.pieces]
        assert continuation.text == whole.text
        assert chunks[-1][-1].finish == "length"

    with_service(tmp_path, test)


def test_a_chunk_ends_at_a_stop_string(tmp_path: Path) -> None:
    async def test(house: House) -> None:
        whole = await complete(house, prompt=[65, 66], max_new_tokens=12)
        stop = whole.text[4:6]
        request = GenerationRequest(prompt=[65, 66], max_new_tokens=12, stop=(stop,))
        continuation = await open_one(house, request)
        await until(house.pool.engine_rests)
        (chunk,) = [chunk async for chunk in continuation.chunks()]
        assert chunk[-1].finish == "stop_sequence"
        assert continuation.text == whole.text[: whole.text.index(stop)]

    with_service(tmp_path, test)


def test_text_before_a_fault_is_delivered_before_it(tmp_path: Path) -> None:
    async def test(house: House) -> None:
        warm_up = len(house.runner.batches)

        def fails(slots: Sequence[int]) -> None:
            if len(house.runner.batches) - warm_up == 3:
                raise RuntimeError("a broken kernel")

        house.runner.on_decode = fails
        continuation = await open_one(house, GenerationRequest(prompt=[65, 66], max_new_tokens=12))
        await until(house.pool.engine_rests)
        with pytest.raises(GenerationFailed):
            await continuation.run()
        continuation.close()
        assert len(continuation.pieces) == 4

    with_service(tmp_path, test)
