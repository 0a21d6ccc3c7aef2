"""Examples of each mode of the cache manager. What all modes share is in tests/contracts."""

from __future__ import annotations

from array import array

import pytest

from pagemill.base.errors import CapacityError, ConfigError, IntegrityError
from pagemill.cache.entry import SharingConfig
from pagemill.cache.manager import CacheManager


def test_unknown_mode_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"'pagd'.*paged, contiguous, none"):
        CacheManager(4, 16, "pagd")  # type: ignore[arg-type]


def test_block_size_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="block_size is 0"):
        CacheManager(4, 0)


def test_paged_takes_only_the_blocks_of_known_tokens() -> None:
    cache = CacheManager(8, 4)
    cache.open(1, num_tokens=5, reserve=30)
    assert list(cache.block_table(1)) == [0, 1]
    assert cache.stats().num_unused_positions == 3


def test_paged_grows_by_a_block_only_at_its_boundary() -> None:
    cache = CacheManager(8, 4)
    cache.open(1, 3, 30)
    sizes = []
    for num_tokens in range(4, 10):
        cache.resize(1, num_tokens)
        sizes.append(len(cache.block_table(1)))
    assert sizes == [1, 2, 2, 2, 2, 3]


def test_paged_rollback_frees_whole_blocks_and_uncommits() -> None:
    cache = CacheManager(8, 4)
    cache.open(1, 11, 30)
    cache.commit(1, 10)
    cache.resize(1, 6)
    assert len(cache.block_table(1)) == 2
    assert (cache.num_committed(1), cache.num_history(1)) == (6, 6)
    assert cache.num_free_blocks == 6
    cache.verify()


def test_rollback_above_the_committed_length_keeps_it() -> None:
    cache = CacheManager(8, 4)
    cache.open(1, 11, 30)
    cache.commit(1, 5)
    cache.resize(1, 9)
    assert cache.num_committed(1) == 5


def test_contiguous_reserves_consecutive_blocks_for_the_longest_length() -> None:
    cache = CacheManager(8, 4, "contiguous")
    cache.open(1, num_tokens=2, reserve=10)
    cache.open(2, num_tokens=9, reserve=10)
    assert list(cache.block_table(1)) == [0, 1, 2]
    assert list(cache.block_table(2)) == [3, 4, 5]
    assert not cache.can_open(1, 10)
    assert cache.stats().num_unused_positions == 6 * 4 - 11


def test_contiguous_keeps_its_blocks_when_it_shrinks() -> None:
    cache = CacheManager(8, 4, "contiguous")
    cache.open(1, 9, 10)
    cache.resize(1, 1)
    assert list(cache.block_table(1)) == [0, 1, 2]
    assert cache.num_history(1) == 1


def test_contiguous_does_not_grow_beyond_its_reservation() -> None:
    cache = CacheManager(8, 4, "contiguous")
    cache.open(1, 2, 10)
    assert cache.can_resize(1, 12)
    assert not cache.can_resize(1, 13)
    with pytest.raises(CapacityError, match="13 positions and 12 were reserved"):
        cache.resize(1, 13)
    assert cache.num_history(1) == 2


def test_contiguous_needs_its_blocks_in_one_piece() -> None:
    cache = CacheManager(6, 4, "contiguous")
    for seq_id in range(6):
        cache.open(seq_id, 1, 4)
    for seq_id in (1, 3, 5):
        cache.close(seq_id)
    assert cache.num_free_blocks == 3
    assert not cache.can_open(1, 8)
    assert cache.can_open(1, 4)


def test_none_holds_blocks_for_one_step_only() -> None:
    cache = CacheManager(4, 4, "none")
    cache.open(1, 9, 30)
    assert cache.num_free_blocks == 4
    cache.resize(1, 9)
    assert cache.num_free_blocks == 1
    cache.commit(1, 9)
    assert cache.num_free_blocks == 4
    assert (cache.num_committed(1), cache.num_history(1)) == (0, 0)
    cache.verify()


def test_stats_tell_blocks_positions_and_waste() -> None:
    cache = CacheManager(10, 4)
    cache.open(1, 5, 20)
    cache.open(2, 8, 20)
    stats = cache.stats()
    assert (stats.num_blocks, stats.num_free_blocks, stats.num_active_blocks) == (10, 6, 4)
    assert (stats.num_sequences, stats.num_positions, stats.num_unused_positions) == (2, 13, 3)
    assert stats.num_leaked_blocks == 0


def test_a_text_that_is_looked_up_again_is_counted_apart_and_not_in_the_curve() -> None:
    cache, tokens = CacheManager(30, 4, sharing=SharingConfig()), array("i", range(31))
    cache.open(0, 31, 40, array("i", tokens))
    cache.commit(0, 31)
    cache.publish_tail(0)
    for sibling in (1, 2, 3):
        assert cache.open(sibling, 31, 40, array("i", tokens), again=True).num_hit == 30
    stats = cache.stats()
    assert (stats.num_asked_tokens, stats.num_hit_tokens) == (30, 0)
    assert (stats.num_reentry_tokens, stats.num_reentry_hit_tokens) == (90, 90)
    assert cache.curve.num_recorded == 7, "whole blocks of the first look-up"
    assert cache.curve.curve([30]) == [0.0]
    cache.open(4, 31, 40, array("i", tokens))
    assert cache.curve.num_recorded == 14
    assert cache.curve.curve([30]) == [0.5]
    cache.verify()


def test_check_notices_blocks_that_nobody_owns() -> None:
    cache = CacheManager(4, 4)
    cache.open(1, 4, 8)
    cache._sequences.pop(1)
    cache._num_owned -= 1
    assert cache.stats().num_leaked_blocks == 1
    with pytest.raises(IntegrityError, match="lost count"):
        cache.check()


@pytest.mark.parametrize("damage", ["share", "lengths", "count"])
def test_verify_notices_broken_tables(damage: str) -> None:
    cache = CacheManager(8, 4)
    cache.open(1, 4, 8)
    cache.open(2, 4, 8)
    first, second = cache._sequences[1], cache._sequences[2]
    if damage == "share":
        second.table[0] = first.table[0]
    elif damage == "lengths":
        first.committed = 5
    else:
        cache._pool.retain(first.table)
    with pytest.raises(IntegrityError):
        cache.verify()
