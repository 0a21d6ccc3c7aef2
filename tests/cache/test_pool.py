"""Behaviour of the block pool on its own: counts, order, refusals."""

from __future__ import annotations

import pytest

from pagemill.base.errors import CapacityError, ConfigError, IntegrityError
from pagemill.cache.pool import BlockPool, PoolCounts


def test_new_pool_is_all_free() -> None:
    assert BlockPool(5).counts() == PoolCounts(num_blocks=5, num_free=5, num_active=0)


@pytest.mark.parametrize("num_blocks", [0, -3])
def test_pool_without_blocks_is_refused_with_the_option_to_change(num_blocks: int) -> None:
    with pytest.raises(ConfigError, match="kv_cache_memory_bytes"):
        BlockPool(num_blocks)


def test_blocks_come_in_ascending_order_and_only_once() -> None:
    pool = BlockPool(6)
    assert list(pool.allocate(2)) == [0, 1]
    assert list(pool.allocate(3)) == [2, 3, 4]
    assert pool.counts() == PoolCounts(6, 1, 5)
    pool.verify()


def test_allocating_nothing_changes_nothing() -> None:
    pool = BlockPool(2)
    assert list(pool.allocate(0)) == []
    pool.release([])
    assert pool.num_free == 2


def test_released_blocks_are_taken_first_and_in_their_order() -> None:
    pool = BlockPool(8)
    table = pool.allocate(4)
    pool.release(table)
    assert list(pool.allocate(4)) == list(table)


def test_failed_allocation_changes_nothing() -> None:
    pool = BlockPool(4)
    pool.allocate(3)
    assert not pool.can_allocate(2)
    with pytest.raises(CapacityError, match=r"2 blocks.*1 of 4 are free.*kv_cache_memory_bytes") as caught:
        pool.allocate(2)
    assert caught.value.retry_after_s is not None
    assert pool.counts() == PoolCounts(4, 1, 3)
    assert list(pool.allocate(1)) == [3]
    pool.verify()


def test_allocation_beyond_an_idle_pool_does_not_advise_waiting() -> None:
    with pytest.raises(CapacityError) as caught:
        BlockPool(4).allocate(5)
    assert caught.value.retry_after_s is None


def test_run_is_the_lowest_gap_that_is_long_enough() -> None:
    pool = BlockPool(10)
    pool.allocate(10)
    pool.release([1, 4, 5, 7, 8, 9])
    assert pool.can_allocate_run(3)
    assert list(pool.allocate_run(2)) == [4, 5]
    assert list(pool.allocate_run(3)) == [7, 8, 9]
    pool.verify()


def test_run_is_refused_where_free_blocks_are_scattered() -> None:
    pool = BlockPool(5)
    pool.allocate(5)
    pool.release([0, 2, 4])
    assert pool.can_allocate(2)
    assert not pool.can_allocate_run(2)
    with pytest.raises(CapacityError, match="2 consecutive blocks"):
        pool.allocate_run(2)
    assert pool.num_free == 3
    pool.verify()


def test_shared_block_is_free_only_after_its_last_holder() -> None:
    pool = BlockPool(3)
    table = pool.allocate(2)
    pool.retain(table)
    pool.release(table)
    assert [pool.num_holders(block) for block in table] == [1, 1]
    assert pool.num_free == 1
    pool.release(table)
    assert pool.num_free == 3
    pool.verify()


def test_double_free_is_refused_and_changes_nothing() -> None:
    pool = BlockPool(4)
    table = pool.allocate(3)
    pool.release(table[1:2])
    with pytest.raises(IntegrityError, match=r"block 1 .* freed twice"):
        pool.release(table)
    assert [pool.num_holders(block) for block in range(4)] == [1, 0, 1, 0]
    pool.verify()


def test_block_twice_in_one_release_is_a_double_free() -> None:
    pool = BlockPool(4)
    pool.allocate(2)
    with pytest.raises(IntegrityError):
        pool.release([0, 1, 0])
    assert pool.num_active == 2
    pool.verify()


def test_free_block_cannot_be_shared() -> None:
    pool = BlockPool(4)
    table = pool.allocate(1)
    with pytest.raises(IntegrityError, match=r"block 2 .* is free"):
        pool.retain([*table, 2])
    assert pool.num_holders(0) == 1


def test_check_notices_a_lost_block() -> None:
    pool = BlockPool(4)
    pool._num_free -= 1
    with pytest.raises(IntegrityError, match="3 free"):
        pool.check()


@pytest.mark.parametrize("damage", ["link", "refs", "held"])
def test_verify_notices_a_damaged_free_list(damage: str) -> None:
    pool = BlockPool(4)
    pool.allocate(1)
    if damage == "link":
        pool._free[0] = pool._free[1]
    elif damage == "refs":
        pool._refs[3] = 1
    else:
        pool._held[3] = 1
    with pytest.raises(IntegrityError):
        pool.verify()
