"""The order of one tenant's queue: arrival, priority as seconds of waiting, and those that ran before in front."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pagemill.engine.queue import MOST_KEPT, PRIORITY_S, TenantQueue
from pagemill.engine.request import Sequence
from tests.fixtures.queued import sequence


def order(queue: TenantQueue) -> list[int]:
    return [each.seq_id for each in queue.first(len(queue))]


def filled(*sequences: Sequence) -> TenantQueue:
    queue = TenantQueue()
    for each in sequences:
        queue.add(each)
    return queue


def test_equal_priorities_go_by_arrival_and_then_by_number() -> None:
    assert order(filled(sequence(1, 5.0), sequence(2, 3.0), sequence(4, 4.0), sequence(3, 4.0))) == [2, 3, 4, 1]


def test_lower_priority_value_goes_first_as_if_it_had_come_earlier() -> None:
    queue = filled(sequence(1, 0.0), sequence(2, 1.0, priority=-1), sequence(3, PRIORITY_S + 2.0, priority=-1))
    assert order(queue) == [2, 1, 3], "one unit does not outweigh more than its seconds of waiting"


def test_last_priority_comes_before_those_who_arrive_long_after() -> None:
    late = 200 * PRIORITY_S + 1
    assert order(filled(sequence(2, late, priority=-100), sequence(1, 0.0, priority=100))) == [1, 2]


def test_those_that_ran_before_go_first_by_rank() -> None:
    assert order(filled(sequence(1, 0.0, priority=-100), sequence(2, 9.0, rank=7), sequence(3, 9.0, rank=4))) == [
        3,
        2,
        1,
    ]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(-2, 2), st.integers(0, 3)), max_size=20), st.data())
def test_removed_ones_leave_the_order_of_the_others(drawn: list[tuple[int, int, int]], data: st.DataObject) -> None:
    sequences = [sequence(i, float(at), priority, rank) for i, (at, priority, rank) in enumerate(drawn, 1)]
    queue = filled(*sequences)
    before = order(queue)
    gone = data.draw(st.sets(st.sampled_from(before))) if before else set()
    for each in sequences:
        if each.seq_id in gone:
            queue.remove(each)
    assert order(queue) == [each for each in before if each not in gone]
    assert len(queue) == len(before) - len(gone)


def test_a_kept_place_is_no_waiting_sequence_and_is_found_where_it_was_without_its_text() -> None:
    sequences = [sequence(number, float(number)) for number in (1, 2, 3)]
    queue = filled(*sequences)
    queue.remove(sequences[1])
    queue.keep_place(sequences[1], 3)
    assert len(queue) == 2
    assert [each.seq_id for each in queue.first(3)] == [1, 2, 3]
    place = queue.first(2)[1]
    assert place.status == "finished"
    assert not place.tokens
    assert not place.request.prompt_token_ids
    assert place.num_found == 3
    queue.drop_place(place)
    assert [each.seq_id for each in queue.first(3)] == [1, 3]
    for each in (sequences[0], sequences[2]):
        queue.remove(each)
    assert not queue


@given(st.permutations(range(2, 2 * MOST_KEPT)))
def test_only_so_many_places_are_kept_and_the_front_ones_stay(numbers: list[int]) -> None:
    queue = filled(sequence(1, 0.0))
    kept: list[int] = []
    for number in numbers:
        each = sequence(number, float(number))
        assert queue.would_keep(each) == (number in sorted([*kept, number])[:MOST_KEPT])
        queue.keep_place(each, 0)
        kept = sorted([*kept, number])[:MOST_KEPT]
    assert len(queue) == 1
    assert [each.seq_id for each in queue.first(2 * MOST_KEPT)] == list(range(1, MOST_KEPT + 2))
