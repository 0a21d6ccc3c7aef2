"""Another number of blocks: what stays, what goes, what moves, and in which order it goes later."""

from __future__ import annotations

import random
from array import array

import pytest

from pagemill.base.errors import CapacityError, ConfigError
from pagemill.base.kv_spec import KVSpec, LayerKV
from pagemill.base.params import CacheOptions
from pagemill.base.transfer import Moves
from pagemill.cache.entry import SharingConfig
from pagemill.cache.manager import CacheManager
from tests.cache.test_tenancy import make, num_kept, store, text


def resize(cache: CacheManager, num_blocks: int) -> Moves:
    """What an engine does; returns the moves that a smaller size asked for."""
    cache.moved(cache.moves())
    moves = Moves()
    if num_blocks < cache.num_blocks:
        moves = cache.vacate(num_blocks)
        cache.moved(Moves(moves.wipes))
        cache.relocate()
    cache.set_num_blocks(num_blocks)
    cache.verify()
    return moves


def test_cached_texts_beyond_the_end_move_where_there_is_room() -> None:
    cache, shared = make(20)
    for index in range(1, 4):
        store(cache, text(index, 4), CacheOptions())
    shared.purge_text(CacheOptions(), text(1, 4))
    moves = resize(cache, 8)
    assert len(moves.copies) == 4
    assert all(copy.source >= 8 > copy.target for copy in moves.copies)
    assert cache.stats().num_evicted_blocks == 0
    for index in (2, 3):
        assert num_kept(shared, text(index, 4), CacheOptions()) == 4
        assert shared.entry(CacheOptions(), text(index, 4), 16).match.num_tail_tokens == 3


def test_what_a_floor_keeps_survives_wherever_it_lies() -> None:
    cache, shared = make(30)
    shared.set_quota("kept", 8, None)
    store(cache, text(1, 20), CacheOptions("other"))
    store(cache, text(2, 8), CacheOptions("kept"))
    assert max(node.block for node in shared.chain_of(CacheOptions("kept"), text(2, 8))) >= 20
    resize(cache, 9)
    assert num_kept(shared, text(2, 8), CacheOptions("kept")) == 8
    assert num_kept(shared, text(1, 20), CacheOptions("other")) == 1


def test_what_goes_is_what_the_policy_names_and_not_what_lies_beyond_the_end() -> None:
    cache, shared = make(20)
    for index in range(1, 6):
        store(cache, text(index, 4), CacheOptions())
    store(cache, text(1, 4), CacheOptions())
    resize(cache, 8)
    kept = [num_kept(shared, text(index, 4), CacheOptions()) for index in range(1, 6)]
    assert kept == [4, 0, 0, 0, 4]


def test_texts_that_moved_keep_their_place_in_the_order() -> None:
    cache, shared = make(20)
    for index in range(1, 6):
        store(cache, text(index, 3), CacheOptions())
    shared.purge_text(CacheOptions(), text(1, 3))
    resize(cache, 12)
    for index, left in ((6, [3, 3, 3]), (7, [0, 3, 3]), (8, [0, 0, 3])):
        store(cache, text(index, 3 if index > 6 else 0), CacheOptions())
        assert [num_kept(shared, text(each, 3), CacheOptions()) for each in (2, 3, 4)] == left, index


def test_blocks_that_take_the_numbers_of_moved_ones_stand_for_themselves() -> None:
    """After a shrink and a growth, a new block may have the number under which a policy still knows a moved one."""
    draw = random.Random(5)
    cache, shared = make(24)
    for turn in range(300):
        store(cache, text(draw.randrange(12), draw.randint(1, 5)), CacheOptions())
        if turn % 5 == 0:
            resize(cache, draw.randint(8, 30))
    for node in list(shared.tree.nodes.values()):
        assert node.shelf is not None
    while cache.stats().num_cached_blocks:
        shared.evict_any()
        cache.verify()
    assert not shared.shelves._moved


def test_pins_move_with_their_blocks() -> None:
    cache, shared = make(20)
    store(cache, text(1, 12), CacheOptions())
    store(cache, text(2, 4), CacheOptions())
    lease = shared.pin(CacheOptions(), text(2, 4), 100.0)
    resize(cache, 5)
    assert num_kept(shared, text(2, 4), CacheOptions()) == 4
    assert cache.stats().num_pinned_blocks == 4
    assert shared.unpin(lease.lease_id)
    cache.verify()


def test_a_size_below_what_lives_is_refused_and_changes_nothing() -> None:
    cache, shared = make(20)
    tokens = text(1, 6)
    cache.open(1, len(tokens), 100, tokens, CacheOptions())
    store(cache, text(2, 3), CacheOptions())
    shared.pin(CacheOptions(), text(2, 3), 10.0)
    before = cache.stats()
    with pytest.raises(
        CapacityError, match=r"of 8 blocks cannot hold the 9 blocks that sequences and pins use; give at least that"
    ) as caught:
        cache.vacate(8)
    assert caught.value.retry_after_s
    assert cache.stats() == before
    resize(cache, 9)
    with pytest.raises(ConfigError, match=r"holds no block of the KV cache; give at least 9 blocks"):
        cache.vacate(0)


def test_sizes_that_are_refused_are_told_in_bytes_which_are_enough() -> None:
    kv_spec = KVSpec((LayerKV(2, 16),), 16)
    cache = CacheManager(20, 16, "paged", SharingConfig(), kv_spec)
    assert cache.shared is not None
    assert kv_spec.blocks_in(kv_spec.memory_bytes(3)) == 3 > kv_spec.blocks_in(kv_spec.memory_bytes(3) - 1)
    with pytest.raises(ConfigError, match=r"no block of the KV cache; give at least 2,048 bytes \(1 block\)"):
        cache.vacate(0)
    tokens = array("i", range(48))
    cache.open(1, 48, 100, tokens, CacheOptions())
    with pytest.raises(CapacityError, match=r"of 4,096 bytes \(2 blocks\) cannot hold the 6,144 bytes \(3 blocks\)"):
        cache.vacate(2)
    cache.shared.set_quota("a", 6, None)
    with pytest.raises(ConfigError, match=r"floors need 12,288 bytes \(6 blocks\) of KV cache and 10,240 bytes \(5 "):
        cache.vacate(5)


def test_a_size_below_the_floors_is_refused() -> None:
    cache, shared = make(20)
    shared.set_quota("a", 6, None)
    shared.set_quota("b", 6, None)
    before = cache.stats()
    with pytest.raises(ConfigError, match="floors need 12 blocks of KV cache and 11 blocks would be left"):
        cache.vacate(11)
    assert cache.stats() == before
    resize(cache, 12)


@pytest.mark.parametrize("mode", ["contiguous", "none"])
def test_other_modes_keep_their_size(mode: str) -> None:
    with pytest.raises(CapacityError, match="set kv_cache to paged"):
        CacheManager(8, 4, mode).vacate(4)  # type: ignore[arg-type]


def test_a_smaller_size_that_is_given_up_leaves_everything_where_it_was() -> None:
    cache, shared = make(20)
    store(cache, text(1, 10), CacheOptions())
    cache.moved(cache.moves())
    tokens = text(2, 6)
    cache.open(1, len(tokens), 100, tokens, CacheOptions())
    tables = array("i", cache.block_table(1))
    cache.vacate(17)
    cache.set_num_blocks(20)
    cache.verify()
    assert cache.block_table(1) == tables
    assert num_kept(shared, text(1, 10), CacheOptions()) == 10
