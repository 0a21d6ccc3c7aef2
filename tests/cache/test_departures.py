"""Why blocks left, counted by reason, and what a purge leaves behind in memory: nothing."""

from __future__ import annotations

import gc
from array import array
from collections.abc import Callable, Iterator

import pytest

from pagemill.base.params import CacheOptions, Retain
from pagemill.cache.manager import CacheManager
from pagemill.cache.sharing import SharedBlocks
from tests.cache.test_tenancy import SIZE, make, store, text

OWN, OTHER = CacheOptions("t"), CacheOptions("u")


def left(cache: CacheManager) -> dict[str, int]:
    return {reason: count for reason, count in cache.stats().num_left_blocks.items() if count}


def test_room_for_others_is_capacity() -> None:
    cache, _ = make(8)
    store(cache, text(1, 8), OWN)
    store(cache, text(2, 3), OTHER)
    assert left(cache) == {"capacity": 3}
    assert cache.stats().num_evicted_blocks == 3


def test_a_cap_is_quota_whether_it_is_met_or_lowered() -> None:
    cache, shared = make(20)
    shared.set_quota("t", 0, 6)
    store(cache, text(1, 6), OWN)
    store(cache, text(2, 2), OWN)
    assert left(cache) == {"quota": 2}
    shared.set_quota("t", 0, 3)
    assert left(cache) == {"quota": 5}


def test_a_smaller_cache_is_resize() -> None:
    cache, _ = make(10)
    store(cache, text(1, 9), OWN)
    cache.vacate(4)
    cache.relocate()
    cache.set_num_blocks(4)
    assert left(cache) == {"resize": 5}


def test_a_purge_a_longer_tail_and_a_rollback_are_no_evictions() -> None:
    cache, shared = make(20)
    store(cache, text(1, 2)[: SIZE + 2], OWN)
    store(cache, text(1, 2), OWN)
    assert left(cache) == {"replaced": 1}
    tokens = text(2, 3)
    cache.open(7, len(tokens), 1000, tokens, OWN)
    cache.commit(7, len(tokens))
    cache.resize(7, len(tokens) - 1)
    cache.close(7)
    assert left(cache) == {"replaced": 1, "rollback": 1}
    assert shared.purge_tenant("t") == 2 + 3
    assert left(cache) == {"replaced": 1, "rollback": 1, "purge": 5}
    assert cache.stats().num_evicted_blocks == 0


def test_a_cache_that_contradicted_itself_is_quarantine() -> None:
    cache, _ = make(10)
    store(cache, text(1, 4), OWN)
    cache.rebuild()
    assert left(cache) == {"quarantine": 4}


# What is remembered


def reachable(root: object) -> Iterator[object]:
    """Everything that an object keeps alive, but for classes and modules."""
    seen, stack = {id(root)}, [root]
    while stack:
        each = stack.pop()
        yield each
        for other in gc.get_referents(each):
            if id(other) not in seen and not isinstance(other, type) and not hasattr(other, "__spec__"):
                seen.add(id(other))
                stack.append(other)


def remembers(cache: CacheManager, tokens: array[int]) -> bool:
    """True where any of these tokens is still to be found in what the cache keeps, packed or not."""
    wanted = set(tokens)
    return any(
        not wanted.isdisjoint(array("i", each) if isinstance(each, bytes) else each)
        for each in reachable(cache)
        if isinstance(each, array) or (isinstance(each, bytes) and len(each) % 4 == 0)
    )


def purge_request(shared: SharedBlocks, tokens: array[int]) -> None:
    shared.purge_text(OWN, tokens)


def purge_prefix(shared: SharedBlocks, tokens: array[int]) -> None:
    shared.purge_prefix(OWN, tokens[: SIZE + 1])
    shared.purge_prefix(OWN, tokens[:1])


def purge_namespace(shared: SharedBlocks, tokens: array[int]) -> None:
    shared.purge_namespace(OWN)


def purge_tenant(shared: SharedBlocks, tokens: array[int]) -> None:
    shared.purge_tenant("t")


@pytest.mark.parametrize("num_left", [0, 2, 5])
@pytest.mark.parametrize("purge", [purge_request, purge_prefix, purge_namespace, purge_tenant])
def test_after_a_purge_no_token_is_left_in_memory(
    purge: Callable[[SharedBlocks, array[int]], None], num_left: int
) -> None:
    """Whether its blocks are still there, some of them, or none."""
    cache, shared = make(12)
    secret = array("i", [0x5EC00000 + each for each in range(5 * SIZE - 1)])
    store(cache, secret, CacheOptions("t", retain=(Retain(0, SIZE, priority=50, ttl_s=60.0),)))
    store(cache, text(2, 7 + 5 - num_left), OTHER)
    assert len(shared.chain_of(OWN, secret)) == num_left
    assert remembers(cache, secret)
    purge(shared, secret[:])
    cache.moved(cache.moves())
    assert not remembers(cache, secret)
    assert remembers(cache, text(2, 1)), "another tenant's texts stay"


def test_a_purge_of_one_text_leaves_what_others_go_on_from() -> None:
    cache, shared = make(8)
    first, second = text(1, 4), array("i", [*text(1, 2), *text(3, 2)])
    store(cache, first, OWN)
    store(cache, second, OWN)
    store(cache, text(2, 8), OTHER)
    shared.purge_text(OWN, first)
    assert not remembers(cache, text(1, 4)[2 * SIZE :])
    lookup = cache.open(1, len(second), 1000, second, OWN) if cache.can_open(16, 1000, 0, second, OWN) else None
    assert lookup is not None
    assert lookup.miss is not None
    assert lookup.miss.reason == "evicted"


def test_blocks_behind_one_that_left_otherwise_are_not_remembered_without_it() -> None:
    cache, shared = make(8)
    store(cache, text(1, 4), OWN)
    store(cache, text(2, 6), OTHER)
    assert len(shared.lookups.evicted) == 2
    [*_, last] = shared.chain_of(OWN, text(1, 4))
    shared.discard(last, "rollback")
    assert len(shared.lookups.evicted) == 0
