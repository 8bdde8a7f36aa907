"""Places: counted, promised, refused, and given back."""

import pytest

from server.errors import NotReady, Overloaded
from server.lifecycle import Lifecycle
from server.service.admission import UNREAD, Places
from tests.fakes import Outcomes


class Queues:
    """Queues that drain in ``seconds``."""

    def __init__(self) -> None:
        self.seconds: float | None = None
        self.asked = 0

    def drain_seconds(self) -> float | None:
        self.asked += 1
        return self.seconds


def places(limit: int = 2, queues: Queues | None = None, outcomes: Outcomes | None = None) -> Places:
    return Places(limit, Lifecycle(), queues or Queues(), outcomes or Outcomes())


def test_all_or_none_are_reserved() -> None:
    some = places(2)
    some.reserve(1)
    with pytest.raises(Overloaded, match="all 2 places are taken"):
        some.reserve(2)
    assert some.in_flight == 1
    some.reserve(1)
    some.release(2)
    assert some.in_flight == 0


def test_a_promised_place_is_not_free_until_it_is_released() -> None:
    some = places(1)
    promise = some.promised.promise()
    assert isinstance(some.refusal(1), Overloaded)
    promise.release()
    assert some.refusal(1) is None


def test_a_place_is_given_back_when_its_work_fails() -> None:
    some = places(1)

    def fail() -> None:
        with some.reserved():
            assert some.in_flight == 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert some.in_flight == 0


def test_an_answer_holds_a_place_above_the_limit_until_it_is_released_once() -> None:
    some = places(1)
    some.reserve(1)
    release = some.hold()
    assert some.in_flight == 2
    release()
    release()
    assert some.in_flight == 1


def test_a_draining_server_has_no_places() -> None:
    lifecycle = Lifecycle()
    some = Places(1, lifecycle, Queues(), Outcomes())
    lifecycle.drain()
    assert isinstance(some.refusal(1), NotReady)
    with pytest.raises(NotReady):
        some.reserve(1)
    assert some.in_flight == 0


def test_an_arrival_is_what_gets_a_place() -> None:
    some, arrivals = places(1), []
    some.on_arrival = lambda: arrivals.append(some.in_flight)
    some.reserve(1)
    with pytest.raises(Overloaded):
        some.reserve(1)
    assert arrivals == [1]


def test_retries_are_spread_over_twice_the_queue_which_is_estimated_some_times_a_second() -> None:
    queues = Queues()
    queues.seconds = 15.0
    some = places(0, queues)
    spreads = [error.retry_spread for _ in range(50) if (error := some.refusal(1)) is not None]
    assert spreads == [30.0] * 50
    assert queues.asked <= 5
    queues.seconds = None
    assert places(0, queues).retry_spread() == Overloaded.retry_spread


def test_refusals_share_an_error_that_is_never_raised() -> None:
    full = places(0)
    shared = full.refusal(1)
    assert full.refusal(1) is shared
    with pytest.raises(Overloaded) as raised:
        full.reserve(1)
    assert raised.value is not shared  # each raise would add to its traceback
    assert str(raised.value) == str(shared) == "all 0 places are taken"


def test_a_refusal_of_an_unread_request_is_counted_under_its_own_label() -> None:
    outcomes = Outcomes()
    places(1, outcomes=outcomes).observe_unread(Overloaded("full"), is_chat=False)
    assert outcomes.seen == [(UNREAD, Overloaded.error_type, 0)]
