"""Who gives way, and how much of it: counted in recomputed tokens."""

from __future__ import annotations

import pytest

from pagemill.base.errors import CapacityError
from pagemill.base.params import CacheOptions
from pagemill.cache.entry import SharingConfig
from tests.fixtures.fake_engine import Rig
from tests.fixtures.fake_executor import answer


def prompt(length: int, first: int = 1) -> list[int]:
    return [(first + i) % 256 for i in range(length)]


def run_two(max_first: int, max_second: int, **options: object) -> Rig:
    rig = Rig(num_blocks=8, max_num_batched_tokens=64, **options)  # type: ignore[arg-type]
    rig.add("first", prompt(4, 1), max_tokens=max_first)
    rig.add("second", prompt(4, 101), max_tokens=max_second)
    rig.run()
    assert rig.tokens("first") == answer(prompt(4, 1), max_first, 256)
    assert rig.tokens("second") == answer(prompt(4, 101), max_second, 256)
    return rig


def test_a_tail_is_dropped_where_the_other_ends_soon() -> None:
    stats = run_two(22, 22).engine.stats()
    assert stats.num_tails_dropped == stats.num_preemptions > 0
    recomputed = stats.num_computed_tokens - 2 * 25
    assert 0 < recomputed < 17, "less than the whole sequence at the first shortage"


def test_all_is_recomputed_where_all_of_it_would_go_anyway() -> None:
    stats = run_two(29, 24).engine.stats()
    assert (stats.num_tails_dropped, stats.num_preemptions) == (0, 1)


def test_with_a_prefix_cache_a_sequence_goes_back_whole_and_finds_what_was_not_needed() -> None:
    stats = run_two(22, 22, sharing=SharingConfig()).engine.stats()
    assert stats.num_preemptions > 0
    assert stats.num_tails_dropped == 0
    assert stats.num_computed_tokens - 2 * 25 < 17


def test_what_goes_past_the_prefix_cache_keeps_its_head() -> None:
    rig = Rig(num_blocks=8, max_num_batched_tokens=64, sharing=SharingConfig())
    for index in range(2):
        rig.add(f"r{index}", prompt(4, 1 + 100 * index), CacheOptions(bypass=True), max_tokens=22)
    rig.run()
    assert rig.engine.stats().num_tails_dropped > 0
    for index in range(2):
        assert rig.tokens(f"r{index}") == answer(prompt(4, 1 + 100 * index), 22, 256)


def test_the_last_one_waits_in_its_place_when_nobody_came_after_it() -> None:
    rig = Rig(num_blocks=7, max_num_batched_tokens=64)
    rig.add("first", prompt(12), max_tokens=5)  # 3 blocks, then 4
    rig.add("second", prompt(8, 50), max_tokens=9)  # 2 blocks, then 4: one too many
    rig.run()
    stats = rig.engine.stats()
    assert stats.num_preemptions == 0
    assert stats.num_computed_tokens == 16 + 16, "nothing is computed twice"
    assert [len(rows) for rows in rig.rows].count(1) >= 1


def test_a_prompt_that_is_being_read_gives_up_what_it_has_not_read_yet() -> None:
    rig = Rig(num_blocks=14, max_num_batched_tokens=4, max_model_len=64)
    rig.add("decodes", prompt(4), max_tokens=30)
    rig.step()
    rig.add("reads", prompt(40, 90), max_tokens=2)
    rig.run()
    assert rig.tokens("decodes") == answer(prompt(4), 30, 256)
    assert rig.tokens("reads") == answer(prompt(40, 90), 2, 256)


def test_first_entry_decides_even_when_it_was_sent_back_meanwhile() -> None:
    rig = Rig(num_blocks=10, max_num_batched_tokens=64, sharing=SharingConfig())
    for index in range(3):
        rig.add(f"r{index}", prompt(4, 1 + 70 * index), max_tokens=28)
    rig.run()
    finished = [rig.answers[f"r{index}", 0].deltas[-1].marks.finished_s or 0.0 for index in range(3)]
    assert finished == sorted(finished)


def test_a_capped_tenant_gives_way_within_itself_and_nobody_else_does() -> None:
    rig = Rig(num_blocks=40, max_num_batched_tokens=64, sharing=SharingConfig())
    assert rig.cache.shared is not None
    rig.cache.shared.set_quota("capped", 0, 6)
    for index in range(2):
        rig.add(f"c{index}", prompt(4, 1 + 40 * index), CacheOptions(tenant="capped"), max_tokens=18)
    rig.add("other", prompt(4, 200), CacheOptions(tenant="other"), max_tokens=40)
    rig.run()
    rows = [row for step in rig.rows for row in step if row.seq_id == 3]
    assert [row.start for row in rows] == [0, *range(4, 43)], "one row in each step, none twice"
    for index in range(2):
        assert rig.tokens(f"c{index}") == answer(prompt(4, 1 + 40 * index), 18, 256)


def test_a_sequence_beyond_a_cap_that_came_later_fails_when_it_is_the_first_of_its_tenant() -> None:
    rig = Rig(num_blocks=40, max_num_batched_tokens=64, sharing=SharingConfig())
    assert rig.cache.shared is not None
    rig.add("other", prompt(4, 200), CacheOptions(tenant="other"), max_tokens=30)
    rig.add("grows", prompt(4), CacheOptions(tenant="capped"), max_tokens=30)
    rig.step()
    rig.cache.shared.set_quota("capped", 0, 3)
    rig.run()
    error = rig.answers["grows", 0].deltas[-1].error
    assert isinstance(error, CapacityError)
    assert len(rig.tokens("grows")) == 9
    assert rig.answers["other", 0].finish_reason == "length"


@pytest.mark.parametrize("sharing", [None, SharingConfig()], ids=["alone", "shared"])
def test_many_that_do_not_fit_together_all_end_with_their_own_answers(sharing: SharingConfig | None) -> None:
    rig = Rig(num_blocks=16, max_num_batched_tokens=16, max_model_len=64, max_num_seqs=12, sharing=sharing)
    for index in range(24):
        rig.add(f"r{index}", prompt(3 + index % 7, 9 * index), max_tokens=10 + index % 30)
    rig.run()
    for index in range(24):
        assert rig.tokens(f"r{index}") == answer(prompt(3 + index % 7, 9 * index), 10 + index % 30, 256)
