"""Floors, caps, priorities, times to live and pins, as what stays and what goes."""

from __future__ import annotations

from array import array

import pytest

from pagemill.base.errors import CapacityError, ConfigError, RequestError
from pagemill.base.params import CacheOptions, Retain
from pagemill.cache.entry import SharingConfig
from pagemill.cache.manager import CacheManager
from pagemill.cache.sharing import SharedBlocks

SIZE = 4


def make(num_blocks: int = 20, **config: object) -> tuple[CacheManager, SharedBlocks]:
    cache = CacheManager(num_blocks, SIZE, "paged", SharingConfig(**config))  # type: ignore[arg-type]
    assert cache.shared is not None
    return cache, cache.shared


def text(first: int, num_blocks: int) -> array[int]:
    return array("i", range(1000 * first, 1000 * first + SIZE * num_blocks))


def store(cache: CacheManager, tokens: array[int], options: CacheOptions) -> int:
    lookup = cache.open(0, len(tokens), 10_000, tokens, options)
    cache.moved(cache.moves())
    cache.commit(0, len(tokens))
    cache.close(0)
    cache.verify()
    return lookup.num_hit


def num_kept(shared: SharedBlocks, tokens: array[int], options: CacheOptions) -> int:
    return len(shared.chain_of(options, tokens))


def test_a_flood_of_one_tenant_stops_at_the_floor_of_another() -> None:
    cache, shared = make(20)
    shared.set_quota("small", 6, None)
    own, flood = CacheOptions("small"), CacheOptions("flood")
    store(cache, text(1, 8), own)
    for index in range(2, 20):
        store(cache, text(index, 14), flood)
        assert num_kept(shared, text(1, 8), own) == 6
        assert num_kept(shared, text(index, 14), flood) == 14
    tokens = text(30, 15)
    assert not cache.can_open(len(tokens), 1000, 0, tokens, flood)


def test_without_a_floor_the_same_flood_leaves_nothing() -> None:
    cache, shared = make(20)
    store(cache, text(1, 8), CacheOptions("small"))
    for index in range(2, 20):
        store(cache, text(index, 7), CacheOptions("flood"))
    assert num_kept(shared, text(1, 8), CacheOptions("small")) == 0


def test_a_tenant_never_rises_above_its_cap() -> None:
    cache, shared = make(20)
    shared.set_quota("capped", 0, 5)
    options = CacheOptions("capped")
    for index in range(1, 6):
        store(cache, text(index, 4), options)
        assert cache.stats().num_cached_blocks <= 5
    tokens = text(9, 6)
    assert not cache.can_open(len(tokens), 1000, 0, tokens, options)
    with pytest.raises(CapacityError, match="tenant 'capped' may have 5"):
        cache.open(1, len(tokens), 1000, tokens, options)
    assert cache.cap_error(6 * SIZE, options) is not None
    assert cache.cap_error(5 * SIZE, options) is None


def test_a_lower_cap_takes_effect_at_once() -> None:
    cache, shared = make(20)
    store(cache, text(1, 12), CacheOptions("t"))
    shared.set_quota("t", 0, 5)
    cache.verify()
    assert num_kept(shared, text(1, 12), CacheOptions("t")) == 5


@pytest.mark.parametrize(
    ("floor", "cap", "message"),
    [
        (21, None, r"a floor of 84 tokens \(21 blocks\) beside 0 .* exceeds the 80 tokens \(20 blocks\)"),
        (5, 4, "below the floor"),
        (-1, None, "0 or more"),
        (0, 0, "less than a block; give at least 4 tokens"),
        (0, 21, "lower it"),
    ],
)
def test_quotas_that_cannot_be_are_refused_and_change_nothing(floor: int, cap: int | None, message: str) -> None:
    _, shared = make(20)
    with pytest.raises(ConfigError, match=message):
        shared.set_quota("t", floor, cap)
    assert [account.name for account in shared.tenancy.accounts] == ["default"]


def test_floors_together_may_not_exceed_the_memory() -> None:
    _, shared = make(20)
    shared.set_quota("a", 12, None)
    with pytest.raises(ConfigError, match=r"beside 48 tokens \(12 blocks\) promised"):
        shared.set_quota("b", 9, None)
    shared.set_quota("b", 8, None)
    shared.set_quota("a", 0, None)
    shared.set_quota("b", 20, None)


def test_unknown_tenants_are_refused_where_only_known_ones_may_enter() -> None:
    cache, shared = make(20, known_tenants_only=True)
    shared.set_quota("known", 0, None)
    store(cache, text(1, 2), CacheOptions("known"))
    with pytest.raises(RequestError, match="'stranger' is unknown") as caught:
        cache.check_options(CacheOptions("stranger"))
    assert caught.value.status == 403
    assert cache.stats().num_sequences == 0


def test_priority_outranks_recency_until_its_time_ends() -> None:
    cache, shared = make(12)
    important = CacheOptions(retain=(Retain(0, 16, 90, 10.0),))
    store(cache, text(1, 4), important)
    for index in range(2, 8):
        cache.advance(float(index))
        store(cache, text(index, 4), CacheOptions())
    assert num_kept(shared, text(1, 4), important) == 4
    cache.advance(11.0)
    for index in range(8, 12):
        store(cache, text(index, 4), CacheOptions())
    assert num_kept(shared, text(1, 4), important) == 0


def test_low_priority_goes_first_though_it_is_newest() -> None:
    cache, shared = make(12)
    store(cache, text(1, 4), CacheOptions())
    batch = CacheOptions(retain=(Retain(0, 16, 10),))
    for index in range(2, 10):
        store(cache, text(index, 4), batch)
    assert num_kept(shared, text(1, 4), CacheOptions()) == 4, "a batch sweep does not flush what is interactive"


def test_a_hit_may_raise_a_priority() -> None:
    cache, shared = make(12)
    store(cache, text(1, 4), CacheOptions())
    store(cache, text(1, 4), CacheOptions(retain=(Retain(0, 16, 90),)))
    for index in range(2, 8):
        store(cache, text(index, 4), CacheOptions())
    assert num_kept(shared, text(1, 4), CacheOptions()) == 4


def test_pins_end_with_their_lease() -> None:
    cache, shared = make(12)
    store(cache, text(1, 4), CacheOptions())
    lease = shared.pin(CacheOptions(), text(1, 4), 10.0)
    assert (lease.num_tokens, cache.stats().num_pinned_blocks) == (16, 4)
    for index in range(2, 8):
        store(cache, text(index, 4), CacheOptions())
    assert num_kept(shared, text(1, 4), CacheOptions()) == 4
    cache.advance(10.0)
    cache.verify()
    assert cache.stats().num_pinned_blocks == 0
    assert not shared.unpin(lease.lease_id)
    for index in range(8, 12):
        store(cache, text(index, 4), CacheOptions())
    assert num_kept(shared, text(1, 4), CacheOptions()) == 0


def test_a_pin_holds_the_block_that_the_text_ends_in() -> None:
    """Whether the text ends there too, or another one goes on in that block."""
    cache, shared = make(20)
    for number, (length, num_blocks) in enumerate({11: 3, 10: 3, 9: 3, 8: 2, 2: 1}.items()):
        options = CacheOptions(f"t{number}")
        store(cache, text(1, 3)[:11], options)
        lease = shared.pin(options, text(1, 3)[:length], 10.0)
        assert (lease.num_tokens, len(lease.blocks)) == (length, num_blocks)
        assert cache.stats().num_pinned_blocks == num_blocks
        for index in range(2, 8):
            store(cache, text(index, 4), CacheOptions())
        found = shared.entry(options, text(1, 3)[:length] + array("i", [7]), length + 1)
        assert found.num_hit == length
        assert shared.unpin(lease.lease_id)
        cache.verify()


def test_a_pin_holds_no_block_of_a_text_that_parts_within_it() -> None:
    cache, shared = make(20)
    store(cache, text(1, 3), CacheOptions())
    lease = shared.pin(CacheOptions(), text(1, 3)[:10] + array("i", [7]), 10.0)
    assert (lease.num_tokens, len(lease.blocks)) == (8, 2)
    with pytest.raises(RequestError, match="nothing of this text"):
        shared.pin(CacheOptions(), text(1, 3)[:3] + array("i", [7]), 10.0)
    cache.verify()


def test_pins_beyond_a_cap_or_half_of_the_cache_are_refused() -> None:
    cache, shared = make(20)
    shared.set_quota("t", 0, 6)
    store(cache, text(1, 6), CacheOptions("t"))
    shared.pin(CacheOptions("t"), text(1, 5), 10.0)
    shared.pin(CacheOptions("t"), text(1, 6), 10.0)
    store(cache, text(2, 12), CacheOptions())
    before = cache.stats()
    with pytest.raises(CapacityError, match="half of the KV cache"):
        shared.pin(CacheOptions(), text(2, 12), 10.0)
    assert cache.stats() == before
    shared.set_quota("t", 0, 5)
    with pytest.raises(RequestError, match="time above 0"):
        shared.pin(CacheOptions("t"), text(1, 1), -1.0)


def test_a_purge_ends_pins_and_counts_them() -> None:
    cache, shared = make(20)
    store(cache, text(1, 4), CacheOptions("t"))
    shared.pin(CacheOptions("t"), text(1, 4), 100.0)
    assert shared.purge_tenant("t") == 4
    assert shared.leases.num_forced == 1
    assert cache.stats().num_free_blocks == 20
    assert set(cache.moves().wipes) == {0, 1, 2, 3}


def test_a_text_is_purged_without_what_others_share() -> None:
    cache, shared = make(20)
    options = CacheOptions()
    common, first = text(1, 2), text(2, 2)
    store(cache, common + first, options)
    store(cache, common + text(3, 2), options)
    assert shared.purge_text(options, common + first) == 2
    assert num_kept(shared, common + text(3, 2), options) == 4
    assert shared.purge_prefix(options, common[:6]) == 3
    assert num_kept(shared, common, options) == 1


@pytest.mark.parametrize("turned", [False, True])
def test_texts_that_only_each_other_share_are_purged_whole(turned: bool) -> None:
    cache, shared = make(20)
    options = CacheOptions()
    texts = [text(1, 2)[:6], text(1, 3)[:11], text(1, 2) + text(5, 1)]
    store(cache, texts[0], options)
    shared.pin(options, texts[0], 10.0)
    for tokens in texts[1:]:
        store(cache, tokens, options)
    assert len(shared.tree.nodes) == 5, "two whole blocks, an end and another that goes on from it, a third text's last"
    assert sum(shared.purge_text(options, each) for each in (texts[:1:-1] + texts[:2] if turned else texts)) == 5
    assert cache.stats().num_free_blocks == 20
    cache.verify()


@pytest.mark.parametrize("length", [8, 6])
def test_a_pinned_text_outlives_the_purge_of_one_that_goes_on_from_it(length: int) -> None:
    cache, shared = make(20)
    options, tokens = CacheOptions(), text(1, 3)[:11]
    store(cache, tokens[:length], options)
    lease = shared.pin(options, tokens[:length], 10.0)
    assert lease.num_tokens == length
    store(cache, tokens, options)
    assert shared.purge_text(options, tokens) > 0
    assert store(cache, tokens, options) == length
    assert shared.purge_text(options, tokens) > 0
    assert shared.leases.num_forced == 0
    assert shared.purge_text(options, tokens[:length]) > 0, "a pin of the very text ends"
    assert (cache.stats().num_free_blocks, shared.leases.num_forced) == (20, 1)
    assert not shared.unpin(lease.lease_id)


def test_a_pin_takes_no_block_that_a_sequence_still_writes() -> None:
    cache, shared = make(20)
    options, tokens = CacheOptions(), text(1, 3)[:7]
    cache.open(1, len(tokens), 100, tokens, options)
    cache.commit(1, len(tokens))
    cache.publish_tail(1)
    assert shared.pin(options, tokens, 10.0).num_tokens == 4
    cache.close(1)
    assert shared.pin(options, tokens, 10.0).num_tokens == 7
    cache.verify()


def test_a_running_sequence_survives_the_purge_of_its_text() -> None:
    cache, shared = make(20)
    options, tokens = CacheOptions(), text(1, 3)
    store(cache, tokens, options)
    cache.open(1, len(tokens), 1000, tokens, options)
    cache.moved(cache.moves())
    cache.commit(1, len(tokens))
    shared.purge_namespace(options)
    cache.verify()
    tokens.extend(range(8))
    cache.resize(1, len(tokens))
    cache.commit(1, len(tokens))
    cache.close(1)
    cache.verify()
    assert cache.stats().num_free_blocks == 20, "nothing is published behind what was purged"


def test_a_cap_lowered_while_blocks_are_in_use_is_kept_as_they_end() -> None:
    cache, shared = make(20)
    options, tokens = CacheOptions("tenant"), text(1, 6)
    cache.open(1, len(tokens), 100, tokens, options)
    cache.commit(1, len(tokens))
    shared.set_quota("tenant", 0, 2)
    cache.close(1)
    cache.verify()
    assert num_kept(shared, tokens, options) == 2


def test_a_weaker_wish_takes_nothing_from_a_stronger_one() -> None:
    cache, shared = make(20)
    tokens = text(1, 2)
    store(cache, tokens, CacheOptions(retain=(Retain(0, 8, 80, 5.0),)))
    store(cache, array("i", [*tokens, 1, 2]), CacheOptions(retain=(Retain(0, 8, 90, None),)))
    store(cache, array("i", [*tokens, 3, 4]), CacheOptions(retain=(Retain(0, 8, 60, 1.0),)))
    cache.advance(100.0)
    assert {node.priority for node in shared.chain_of(CacheOptions(), tokens)} == {90}


def test_a_tenant_named_like_a_public_namespace_has_an_account_of_its_own() -> None:
    cache, shared = make(20)
    shared.tenancy.declare_public("docs")
    store(cache, text(1, 3), CacheOptions(public="docs"))
    shared.set_quota("public docs", 0, 1)
    shared.set_quota("public:docs", 0, 1)
    assert num_kept(shared, text(1, 3), CacheOptions(public="docs")) == 3


def test_wishes_and_pins_of_the_past_are_not_kept() -> None:
    cache, shared = make(20)
    tokens = text(1, 2)
    store(cache, tokens, CacheOptions())
    for index in range(2000):
        shared.now_s = float(index)
        for node in shared.chain_of(CacheOptions(), tokens):
            shared.retain(node, Retain(0, 8, 80, 5.0))
        shared.unpin(shared.pin(CacheOptions(), tokens, 10.0).lease_id)
    assert len(shared.shelves._expiries) < 200
    assert len(shared.leases._ends) < 200


def test_a_smaller_cache_takes_from_those_above_their_floor_first() -> None:
    cache, shared = make(20)
    shared.set_quota("kept", 8, None)
    store(cache, text(1, 10), CacheOptions("other"))
    store(cache, text(2, 8), CacheOptions("kept"))
    for _ in range(10):
        shared.evict_any()
    assert num_kept(shared, text(2, 8), CacheOptions("kept")) == 8
    assert num_kept(shared, text(1, 10), CacheOptions("other")) == 0
