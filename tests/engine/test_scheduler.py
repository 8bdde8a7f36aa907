from dataclasses import replace

from server.engine.scheduler import Scheduler
from server.engine.sequence import SamplingParams, Sequence


def sequence(prompt: int = 3) -> Sequence:
    return Sequence(list(range(prompt)), SamplingParams(max_new_tokens=4))


def test_first_come_first_served_into_the_lowest_free_slots() -> None:
    scheduler = Scheduler(slots=2, prefill_chunk=8)
    first, second, third = sequence(), sequence(), sequence()
    for one in (first, second, third):
        scheduler.add(one)
    assert scheduler.admit(1.0) == [first, second]
    assert (first.slot, second.slot, third.slot) == (0, 1, None)
    assert (scheduler.running, scheduler.waiting) == (2, 1)
    assert scheduler.remove(first) == 0
    assert scheduler.admit(2.0) == [third]
    assert third.slot == 0
    assert third.timeline.admitted == 2.0


def test_a_long_prompt_is_prefilled_in_chunks_within_one_budget() -> None:
    scheduler = Scheduler(slots=3, prefill_chunk=8)
    long, short = sequence(13), sequence(2)
    scheduler.add(long)
    scheduler.add(short)
    scheduler.admit(0.0)
    assert [(c.sequence, c.count, c.is_last) for c in scheduler.chunks()] == [(long, 8, False)]
    long.prefilled = 8
    assert [(c.sequence, c.count, c.is_last) for c in scheduler.chunks()] == [
        (long, 5, True),
        (short, 2, True),
    ]


def test_a_prompt_gets_less_of_a_step_while_others_decode() -> None:
    scheduler = Scheduler(slots=2, prefill_chunk=8, prefill_chunk_busy=3)
    running, long = sequence(2), sequence(20)
    scheduler.add(long)
    scheduler.admit(0.0)
    assert [c.count for c in scheduler.chunks()] == [8]
    scheduler.add(running)
    scheduler.admit(0.0)
    running.prefilled, running.generated = 2, [5]
    assert [c.count for c in scheduler.chunks()] == [3]
    scheduler.remove(running)
    assert [c.count for c in scheduler.chunks()] == [8]


def test_only_rows_with_a_last_token_are_decoded() -> None:
    scheduler = Scheduler(slots=3, prefill_chunk=8)
    done, pending = sequence(2), sequence(2)
    scheduler.add(done)
    scheduler.add(pending)
    scheduler.admit(0.0)
    done.prefilled, done.generated = 2, [5]
    assert scheduler.decodable() == [done]


def test_a_waiting_sequence_is_removed_without_a_slot() -> None:
    scheduler = Scheduler(slots=1, prefill_chunk=8)
    waiting = sequence()
    scheduler.add(waiting)
    assert scheduler.remove(waiting) is None
    assert not scheduler.has_work


def test_cancelled_and_expired_sequences_running_or_waiting() -> None:
    scheduler = Scheduler(slots=1, prefill_chunk=8)
    gone, late, patient = sequence(), sequence(), sequence()
    gone.cancelled, late.deadline, patient.deadline = True, 5.0, 5.1
    for one in (patient, gone, late):
        scheduler.add(one)
    scheduler.admit(0.0)
    assert scheduler.unwanted(4.9) == [gone]
    assert scheduler.unwanted(5.0) == [gone, late]
    assert scheduler.unwanted(6.0) == [patient, gone, late]


def test_derived_parameters_depend_on_the_parameters_only() -> None:
    """Cached; a copy with other values computes them again, and equality ignores the cache."""
    plain = SamplingParams(max_new_tokens=4)
    assert (plain.is_plain, plain.needs_history, plain.reports) == (True, False, False)
    assert plain == SamplingParams(max_new_tokens=4)
    changed = replace(plain, presence_penalty=1.0, top_n=2)
    assert (changed.is_plain, changed.needs_history, changed.reports) == (False, True, True)
    assert replace(changed, presence_penalty=0.0, top_n=0) == plain
