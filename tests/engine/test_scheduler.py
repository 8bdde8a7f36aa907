from dataclasses import replace

from server.engine.scheduler import Plan, Scheduler
from server.engine.sequence import SamplingParams, Sequence, Status


def sequence(prompt: int = 3) -> Sequence:
    return Sequence(list(range(prompt)), SamplingParams(max_new_tokens=4))


def scheduler_of(*sequences: Sequence, slots: int = 3, busy: int | None = None) -> Scheduler:
    scheduler = Scheduler(slots, prefill_chunk=8, prefill_chunk_busy=busy)
    for one in sequences:
        scheduler.add(one)
    return scheduler


def chunks(plan: Plan) -> list[tuple[Sequence, int, int, bool]]:
    return [(chunk.sequence, chunk.start, chunk.length, chunk.is_last) for chunk in plan.chunks]


def test_first_come_first_served_into_the_lowest_free_slots() -> None:
    first, second, third = sequence(), sequence(), sequence()
    scheduler = scheduler_of(first, second, third, slots=2)
    assert [chunk.sequence for chunk in scheduler.schedule(1.0).chunks] == [first, second]
    assert (first.slot, second.slot) == (0, 1)
    assert [one.status for one in (first, second, third)] == [Status.RUNNING, Status.RUNNING, Status.WAITING]
    assert (scheduler.running, scheduler.waiting) == (2, 1)
    scheduler.finish(first)
    assert [chunk.sequence for chunk in scheduler.schedule(2.0).chunks] == [second, third]
    assert (first.status, third.status) == (Status.FINISHED, Status.RUNNING)
    assert third.slot == 0
    assert third.timeline.admitted == 2.0


def test_a_long_prompt_is_prefilled_in_chunks_within_one_budget() -> None:
    long, short = sequence(13), sequence(2)
    scheduler = scheduler_of(long, short)
    assert chunks(scheduler.schedule(0.0)) == [(long, 0, 8, False)]
    long.prefilled = 8
    plan = scheduler.schedule(0.0)
    assert chunks(plan) == [(long, 8, 5, True), (short, 0, 2, True)]
    assert plan.chunks[0].ids == [8, 9, 10, 11, 12]


def test_a_prompt_gets_less_of_a_step_while_others_decode() -> None:
    running, long = sequence(2), sequence(20)
    scheduler = scheduler_of(long, slots=2, busy=3)
    assert chunks(scheduler.schedule(0.0)) == [(long, 0, 8, False)]
    scheduler.add(running)
    scheduler.schedule(0.0)
    running.prefilled, running.generated = 2, [5]
    assert chunks(scheduler.schedule(0.0)) == [(long, 0, 3, False)]
    scheduler.finish(running)
    assert chunks(scheduler.schedule(0.0)) == [(long, 0, 8, False)]


def test_only_rows_with_a_last_token_are_decoded() -> None:
    done, pending = sequence(2), sequence(2)
    scheduler = scheduler_of(done, pending)
    assert scheduler.schedule(0.0).rows == []
    done.prefilled, done.generated = 2, [5]
    plan = scheduler.schedule(0.0)
    assert plan.rows == [done]
    assert chunks(plan) == [(pending, 0, 2, True)]


def test_rows_are_decoded_in_the_order_of_their_slots() -> None:
    """Also where a low slot was taken again by a younger sequence."""
    first, second, third = sequence(), sequence(), sequence()
    scheduler = scheduler_of(first, second, third, slots=2)
    scheduler.schedule(0.0)
    scheduler.finish(first)
    scheduler.schedule(0.0)
    second.generated = third.generated = [5]
    second.prefilled = third.prefilled = 3
    assert scheduler.schedule(0.0).rows == [third, second]


def test_a_waiting_sequence_is_removed_without_a_slot() -> None:
    waiting = sequence()
    scheduler = scheduler_of(waiting)
    scheduler.finish(waiting)
    assert waiting.status is Status.FINISHED
    assert not scheduler.has_work


def test_cancelled_and_expired_sequences_running_or_waiting() -> None:
    gone, late, patient = sequence(), sequence(), sequence()
    scheduler = scheduler_of(patient, gone, late, slots=1)
    scheduler.schedule(0.0)
    gone.cancelled, late.deadline, patient.deadline = True, 5.0, 5.1
    assert scheduler.schedule(4.9).expired == [gone]
    assert scheduler.schedule(5.0).expired == [late]
    assert scheduler.schedule(6.0).expired == [patient]
    assert {one.status for one in (gone, late, patient)} == {Status.FINISHED}
    assert not scheduler.has_work


def test_the_slot_of_an_expired_sequence_is_emptied_and_used_in_the_same_step() -> None:
    freed: list[int] = []
    scheduler = Scheduler(slots=1, prefill_chunk=8, on_free=freed.append)
    late, waiting, following = sequence(), sequence(), sequence()
    for one in (late, waiting, following):
        scheduler.add(one)
    scheduler.schedule(0.0)
    late.deadline = waiting.deadline = 1.0
    plan = scheduler.schedule(1.0)
    assert (plan.expired, chunks(plan)) == ([late, waiting], [(following, 0, 3, True)])
    assert freed == [following.slot] == [0]


def test_derived_parameters_depend_on_the_parameters_only() -> None:
    """Cached; a copy with other values computes them again, and equality ignores the cache."""
    plain = SamplingParams(max_new_tokens=4)
    assert (plain.is_plain, plain.needs_history, plain.reports) == (True, False, False)
    assert plain == SamplingParams(max_new_tokens=4)
    changed = replace(plain, presence_penalty=1.0, top_n=2)
    assert (changed.is_plain, changed.needs_history, changed.reports) == (False, True, True)
    assert replace(changed, presence_penalty=0.0, top_n=0) == plain
