"""What every mode of the cache promises, whatever it does inside. A new mode is tested by being listed."""

from __future__ import annotations

from typing import get_args

import pytest

from pagemill.base.errors import CapacityError
from pagemill.cache.manager import CacheManager, CacheMode

MODES = get_args(CacheMode)
BLOCK_SIZE = 4
RESERVE = 12


@pytest.fixture(params=MODES)
def cache(request: pytest.FixtureRequest) -> CacheManager:
    return CacheManager(9, BLOCK_SIZE, request.param)


def snapshot(cache: CacheManager, *seq_ids: int) -> tuple[object, ...]:
    sequences = [(list(cache.block_table(s)), cache.num_committed(s), cache.num_history(s)) for s in seq_ids]
    return (cache.stats(), sequences)


def grown(cache: CacheManager, seq_id: int, num_tokens: int) -> None:
    cache.open(seq_id, num_tokens, RESERVE)
    cache.resize(seq_id, num_tokens)


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 8, 12])
def test_admission_predicts_what_open_takes(cache: CacheManager, num_tokens: int) -> None:
    predicted = cache.blocks_to_open(num_tokens, RESERVE)
    before = cache.num_free_blocks
    cache.open(1, num_tokens, RESERVE)
    assert before - cache.num_free_blocks == predicted
    cache.verify()


def test_can_open_agrees_with_open_until_the_cache_is_full(cache: CacheManager) -> None:
    for seq_id in range(9):
        if not cache.can_open(12, RESERVE):
            with pytest.raises(CapacityError):
                cache.open(seq_id, 12, RESERVE)
            break
        cache.open(seq_id, 12, RESERVE)
    assert cache.stats().num_sequences == (9 if cache.mode == "none" else 3)


def test_spare_blocks_are_left_free(cache: CacheManager) -> None:
    spare = 9 - cache.blocks_to_open(5, RESERVE)
    assert cache.can_open(5, RESERVE, spare)
    assert not cache.can_open(5, RESERVE, spare + 1)


def test_tables_cover_their_history_and_never_overlap(cache: CacheManager) -> None:
    for seq_id, num_tokens in enumerate([5, 12, 1]):
        grown(cache, seq_id, num_tokens)
    tables = [set(cache.block_table(seq_id)) for seq_id in range(3)]
    assert len(set.union(*tables)) == sum(map(len, tables))
    assert all(len(cache.block_table(s)) * BLOCK_SIZE >= cache.num_history(s) for s in range(3))
    cache.verify()


def test_failed_open_changes_nothing(cache: CacheManager) -> None:
    for seq_id in range(3):
        grown(cache, seq_id, 12)
    before = snapshot(cache, 0, 1, 2)
    if cache.mode == "none":
        assert cache.can_open(1, RESERVE)
        return
    with pytest.raises(CapacityError):
        cache.open(9, 1, RESERVE)
    assert snapshot(cache, 0, 1, 2) == before


def test_failed_resize_changes_nothing(cache: CacheManager) -> None:
    for seq_id in range(3):
        grown(cache, seq_id, 12)
    before = snapshot(cache, 0, 1, 2)
    assert not cache.can_resize(0, 13)
    with pytest.raises(CapacityError):
        cache.resize(0, 13)
    assert snapshot(cache, 0, 1, 2) == before


def test_growth_and_rollback_come_back_to_the_same_lengths(cache: CacheManager) -> None:
    grown(cache, 1, 3)
    before = snapshot(cache, 1)
    cache.resize(1, 11)
    cache.resize(1, 3)
    assert snapshot(cache, 1) == before


def test_close_gives_everything_back_in_whatever_state(cache: CacheManager) -> None:
    cache.open(1, 5, RESERVE)
    grown(cache, 2, 7)
    grown(cache, 3, 8)
    cache.commit(3, 8)
    for seq_id in (2, 1, 3):
        cache.close(seq_id)
    stats = cache.stats()
    assert (stats.num_free_blocks, stats.num_positions, stats.num_unused_positions) == (9, 0, 0)
    cache.verify()


def test_commit_beyond_the_history_is_our_mistake(cache: CacheManager) -> None:
    grown(cache, 1, 5)
    with pytest.raises(AssertionError):
        cache.commit(1, 6)


def test_sequence_is_opened_once(cache: CacheManager) -> None:
    cache.open(1, 1, RESERVE)
    with pytest.raises(AssertionError, match="open already"):
        cache.open(1, 1, RESERVE)


def test_unknown_sequence_is_our_mistake(cache: CacheManager) -> None:
    with pytest.raises(KeyError):
        cache.close(1)
