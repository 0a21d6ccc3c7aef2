"""Who runs when: order, chunks, budgets, preemption. Asserted as rows of steps, never as times."""

from __future__ import annotations

from array import array

import pytest

from pagemill.base.errors import CapacityError
from pagemill.base.params import SamplingParams
from pagemill.cache.manager import CacheManager, CacheMode
from pagemill.engine.admission import EngineLimits
from pagemill.engine.request import Marks, Request, Sequence
from pagemill.engine.scheduler import Scheduler
from tests.fixtures.fake_engine import Rig
from tests.fixtures.fake_executor import RowRecord, answer


def counts(rig: Rig) -> list[list[int]]:
    """Tokens of each row of each step."""
    return [[row.count for row in rows] for rows in rig.rows]


def prompt(length: int, first: int = 1) -> list[int]:
    return [(first + i) % 256 for i in range(length)]


def test_prompt_is_read_in_one_step_where_the_budget_allows() -> None:
    rig = Rig(max_num_batched_tokens=32)
    rig.add("a", prompt(20), max_tokens=4)
    rig.run()
    assert counts(rig) == [[20], [1], [1], [1]]


@pytest.mark.parametrize(("budget", "chunks"), [(1, [1] * 10), (7, [7, 3]), (9, [9, 1]), (64, [10])])
def test_long_prompt_is_read_in_chunks_and_only_the_last_samples(budget: int, chunks: list[int]) -> None:
    rig = Rig(max_num_batched_tokens=budget)
    rig.add("a", prompt(10), max_tokens=3)
    rig.run()
    assert [row.count for rows in rig.rows for row in rows] == chunks + [1, 1]
    assert [row.sample for rows in rig.rows for row in rows] == [False] * (len(chunks) - 1) + [True] * 3
    assert [row.start for rows in rig.rows for row in rows] == [sum(chunks[:i]) for i in range(len(chunks))] + [10, 11]


def test_decode_row_is_in_every_step_while_a_long_prompt_is_read() -> None:
    rig = Rig(max_num_batched_tokens=8, max_model_len=128)
    rig.add("short", prompt(3), max_tokens=20)
    rig.step()
    rig.add("long", prompt(60), max_tokens=2)
    rig.run()
    assert counts(rig)[:11] == [[3], *[[1, 7]] * 8, [1, 4], [1, 1]]
    assert all(rows[0] == RowRecord(1, 2 + i, 1, True) for i, rows in enumerate(rig.rows[1:20], 1))


def test_budget_bounds_every_step() -> None:
    rig = Rig(max_num_batched_tokens=11)
    for index in range(12):
        rig.add(f"r{index}", prompt(5 + 3 * index, index), max_tokens=6)
    rig.run()
    assert max(map(sum, counts(rig))) == 11


def test_places_bound_every_step() -> None:
    rig = Rig(max_num_seqs=3, max_num_batched_tokens=64)
    for index in range(7):
        rig.add(f"r{index}", prompt(4, index), max_tokens=3)
    rig.run()
    assert [len(rows) for rows in rig.rows] == [3, 3, 3, 3, 3, 3, 1, 1, 1]


def test_places_never_exceed_the_budget_so_that_every_running_sequence_decodes() -> None:
    rig = Rig(max_num_seqs=8, max_num_batched_tokens=3)
    for index in range(6):
        rig.add(f"r{index}", prompt(1, index), max_tokens=4)
    rig.run()
    assert counts(rig) == [[1, 1, 1]] * 8


def test_first_come_is_first_served() -> None:
    rig = Rig(num_blocks=6, max_num_seqs=2, max_num_batched_tokens=16)
    for index in range(6):
        rig.add(f"r{index}", prompt(6, index), max_tokens=3)
    rig.run()
    scheduled = [rig.answers[f"r{index}", 0].deltas[0].marks.scheduled_s for index in range(6)]
    first_token = [rig.answers[f"r{index}", 0].deltas[0].marks.first_token_s for index in range(6)]
    assert scheduled == sorted(scheduled)  # type: ignore[type-var]
    assert first_token == sorted(first_token)  # type: ignore[type-var]


def test_small_request_does_not_overtake_a_large_one_that_waits_for_blocks() -> None:
    rig = Rig(num_blocks=8, max_num_batched_tokens=64)
    rig.add("runs", prompt(12), max_tokens=4)
    rig.add("large", prompt(20), max_tokens=2)
    rig.add("small", prompt(2), max_tokens=2)
    rig.step()
    assert len(rig.rows[0]) == 1
    rig.run()
    first_tokens = {name: rig.answers[name, 0].deltas[0].marks.first_token_s for name in ("large", "small")}
    assert first_tokens["large"] <= first_tokens["small"]  # type: ignore[operator]


def test_newcomer_leaves_a_block_of_growth_to_each_that_runs() -> None:
    rig = Rig(num_blocks=6, max_num_batched_tokens=64)
    rig.add("a", prompt(8), max_tokens=9)  # 2 blocks, grows by 2
    rig.add("b", prompt(8), max_tokens=9)  # 2 blocks + 1 for its growth + 1 for that of a: just fits
    rig.add("c", prompt(1), max_tokens=1)  # 1 block, no growth, but the 2 free ones are spoken for
    rig.step()
    assert [row.seq_id for row in rig.rows[0]] == [1, 2]
    rig.run()


def test_request_that_needs_no_growth_enters_up_to_the_last_block() -> None:
    rig = Rig(num_blocks=4, max_num_batched_tokens=64)
    for index in range(4):
        rig.add(f"r{index}", prompt(3, index), max_tokens=2)
    rig.step()
    assert len(rig.rows[0]) == 4
    assert rig.cache.num_free_blocks == 0
    rig.run()
    assert rig.engine.stats().num_preemptions == 0


def test_latest_gives_way_when_blocks_run_out_and_its_answer_is_unchanged() -> None:
    rig = Rig(num_blocks=8, max_num_batched_tokens=64)
    rig.add("first", prompt(4, 1), max_tokens=24)
    rig.add("second", prompt(4, 9), max_tokens=24)
    rig.run()
    stats = rig.engine.stats()
    assert stats.num_preemptions == stats.num_tails_dropped == 3
    assert not [row for rows in rig.rows[1:] for row in rows if row.start == 0], "what it can keep is not recomputed"
    assert stats.num_computed_tokens == 2 * 27 + 3 * 4, "its tail is computed again, block by block as it was taken"
    for name, first in (("first", 1), ("second", 9)):
        assert rig.tokens(name) == answer(prompt(4, first), 24, 256)
        assert rig.answers[name, 0].finish_reason == "length"


def test_preempted_sequence_comes_back_before_any_later_one() -> None:
    rig = Rig(num_blocks=8, max_num_batched_tokens=64)
    rig.add("first", prompt(4, 1), max_tokens=24)
    rig.add("second", prompt(4, 9), max_tokens=24)
    for _ in range(4):
        rig.step()
    rig.add("third", prompt(1, 50), max_tokens=30)
    rig.run()
    assert rig.engine.stats().num_preemptions >= 1
    order = [name for name, _ in sorted(rig.answers, key=lambda key: rig.answers[key].deltas[-1].marks.finished_s or 0)]
    assert order == ["first", "second", "third"]


def test_earliest_is_never_preempted() -> None:
    rig = Rig(num_blocks=10, max_num_batched_tokens=64, max_model_len=64)
    rig.add("first", prompt(4), max_tokens=36)
    for index in range(5):
        rig.add(f"later{index}", prompt(3, index), max_tokens=20)
    rig.run()
    assert [rows[0].seq_id for rows in rig.rows[:36]] == [1] * 36
    assert rig.engine.stats().num_preemptions > 0


def test_sequence_that_outgrows_a_cache_made_smaller_fails_alone_and_cleanly() -> None:
    rig = Rig(num_blocks=11, max_num_batched_tokens=64)
    rig.add("grows", prompt(4), max_tokens=40)
    rig.engine.resize_cache(4)
    rig.add("small", prompt(4, 77), max_tokens=6)
    answers = rig.run()
    assert answers["grows", 0].finish_reason == "error"
    error = answers["grows", 0].deltas[-1].error
    assert isinstance(error, CapacityError)
    assert "17 tokens and needs 5 blocks" in str(error)
    assert "lower max_tokens or raise kv_cache_memory_bytes" in str(error)
    assert rig.tokens("grows") == answer(prompt(4), 13, 256), "what was generated before the failure was delivered"
    assert rig.tokens("small") == answer(prompt(4, 77), 6, 256)


def test_sequence_that_outgrows_the_cache_alone_fails_at_once_and_is_not_sent_back() -> None:
    rig = Rig(num_blocks=11)
    rig.add("a", prompt(4), max_tokens=40)
    rig.engine.resize_cache(4)
    for _ in range(13):
        rig.step()
    assert [delta.finish_reason for delta in rig.step()] == ["error"]
    assert (rig.executor.num_calls, rig.engine.stats().num_preemptions) == (13, 0)
    rig.assert_empty()


def test_sequence_of_exactly_the_whole_cache_finishes() -> None:
    rig = Rig(num_blocks=4)
    rig.add("a", prompt(4), max_tokens=13)
    rig.run()
    assert rig.answers["a", 0].finish_reason == "length"
    assert rig.tokens("a") == answer(prompt(4), 13, 256)


def test_contiguous_mode_reserves_the_context_and_never_preempts() -> None:
    rig = Rig(num_blocks=20, mode="contiguous", max_model_len=32, max_num_batched_tokens=64)
    for index in range(5):
        rig.add(f"r{index}", prompt(4, index), max_tokens=20)
    rig.step()
    assert len(rig.rows[0]) == 2, "20 blocks hold two reservations of 8"
    rig.run()
    assert rig.engine.stats().num_preemptions == 0


def test_mode_none_recomputes_the_whole_history_each_step() -> None:
    rig = Rig(mode="none", max_num_batched_tokens=32)
    rig.add("a", prompt(6), max_tokens=4)
    rig.run()
    assert rig.rows == [(RowRecord(1, 0, 6 + i, True),) for i in range(4)]
    assert rig.engine.stats().num_computed_tokens == 6 + 7 + 8 + 9


def test_mode_none_runs_one_sequence_beyond_the_budget() -> None:
    rig = Rig(mode="none", max_num_batched_tokens=8)
    rig.add("long", prompt(20), max_tokens=3)
    rig.add("short", prompt(2, 9), max_tokens=2)
    rig.run()
    assert counts(rig) == [[20], [21], [22], [2], [3]]


def test_mode_none_lets_short_ones_use_what_the_earliest_leaves() -> None:
    rig = Rig(mode="none", max_num_batched_tokens=12)
    rig.add("a", prompt(6), max_tokens=2)
    rig.add("b", prompt(9, 20), max_tokens=1)
    rig.add("c", prompt(4, 40), max_tokens=1)
    rig.run()
    assert counts(rig) == [[6, 4], [7], [9]]


def test_mode_none_with_few_scratch_blocks_takes_turns() -> None:
    rig = Rig(mode="none", num_blocks=4, max_num_batched_tokens=64)
    for index in range(3):
        rig.add(f"r{index}", prompt(8, index), max_tokens=5)
    rig.run()
    for index in range(3):
        assert rig.tokens(f"r{index}") == answer(prompt(8, index), 5, 256)


def test_mode_none_refuses_what_would_outgrow_the_scratch_blocks() -> None:
    rig = Rig(mode="none", num_blocks=4, max_num_batched_tokens=64)
    with pytest.raises(CapacityError, match="max_tokens of 5 at the most"):
        rig.add("grows", prompt(12), max_tokens=6)
    rig.add("fits", prompt(12), max_tokens=5)
    rig.add("small", prompt(3), max_tokens=4)
    answers = rig.run()
    assert answers["fits", 0].finish_reason == "length"
    assert answers["small", 0].finish_reason == "length"


@pytest.mark.parametrize("mode", ["paged", "contiguous", "none"])
def test_sequence_that_cannot_enter_an_idle_cache_fails_instead_of_waiting_forever(mode: CacheMode) -> None:
    limits = EngineLimits(max_model_len=40, vocab_size=256)
    cache = CacheManager(4, 4, mode)
    scheduler = Scheduler(limits, cache)
    request = Request("r", array("i", [1] * 30), SamplingParams(), 0, 4, (), 0.0)
    sequence = Sequence(1, request, 0, array("i", request.prompt_token_ids), Marks(0.0))
    scheduler.add(sequence)
    schedule = scheduler.plan(0.0)
    assert [failed for failed, _ in schedule.failed] == [sequence]
    assert (schedule.rows, scheduler.num_waiting, scheduler.running) == ((), 0, [])
    assert cache.stats().num_sequences == 0
    scheduler.remove(sequence)  # a second time changes nothing
    assert sequence.status == "finished"


def test_plan_that_was_not_run_is_planned_again() -> None:
    cache = CacheManager(16, 4)
    scheduler = Scheduler(EngineLimits(max_model_len=40, vocab_size=256, max_num_batched_tokens=4), cache)
    for seq_id in (1, 2):
        request = Request(f"r{seq_id}", array("i", [seq_id] * 6), SamplingParams(), 0, 4, (), 0.0)
        scheduler.add(Sequence(seq_id, request, 0, array("i", request.prompt_token_ids), Marks(0.0)))
    first = scheduler.plan(0.0)
    assert scheduler.plan(1.0) == first
