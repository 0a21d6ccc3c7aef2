"""Why more of a text was not found: every reason, and that none tells of another namespace."""

from __future__ import annotations

from array import array
from dataclasses import replace

import pytest

from pagemill.base.params import CacheOptions
from pagemill.cache.keys import Fingerprint, child_key
from pagemill.cache.manager import CacheManager
from pagemill.cache.receipt import Miss
from pagemill.cache.sharing import SharedBlocks
from tests.cache.test_tenancy import make, store, text

OWN = CacheOptions("t")


def why(cache: CacheManager, tokens: array[int], options: CacheOptions = OWN) -> Miss | None:
    """The reason that a look-up of a text ends with, which leaves nothing behind."""
    lookup = cache.open(99, len(tokens), 10_000, tokens, replace(options))
    cache.close(99)
    cache.moved(cache.moves())
    cache.verify()
    return lookup.miss


def use_fingerprint(shared: SharedBlocks, fingerprint: Fingerprint) -> None:
    shared._config = replace(shared._config, fingerprint=fingerprint)


def test_all_that_can_be_hit_has_no_reason() -> None:
    cache, _ = make(20)
    store(cache, text(1, 3), OWN)
    assert why(cache, text(1, 3)) is None


def test_not_seen() -> None:
    cache, _ = make(20)
    assert why(cache, text(1, 3)) == Miss("not seen", 0)
    assert str(why(cache, text(1, 3))) == "not seen recently"


def test_going_on_from_a_text_that_ended_is_not_seen() -> None:
    cache, _ = make(20)
    store(cache, text(1, 3), OWN)
    assert why(cache, text(1, 5)) == Miss("not seen", 12)


def test_a_text_that_begins_otherwise_than_all_that_are_there_is_not_seen() -> None:
    cache, _ = make(20)
    store(cache, text(1, 3), OWN)
    assert why(cache, text(2, 3)) == Miss("not seen", 0)


@pytest.mark.parametrize("at", [1, 4, 7, 10])
def test_differs(at: int) -> None:
    cache, _ = make(20)
    store(cache, text(1, 3), OWN)
    tokens = text(1, 3)
    tokens[at] = 7
    assert why(cache, tokens) == Miss("differs", at)
    assert str(why(cache, tokens)) == f"differs at token {at}"


def test_evicted_says_when_and_by_which_policy() -> None:
    cache, _ = make(8, policy="lfu")
    cache.advance(10.0)
    store(cache, text(1, 4), OWN)
    cache.advance(12.0)
    store(cache, text(2, 6), OWN)
    cache.advance(15.5)
    miss = why(cache, text(1, 4))
    assert miss == Miss("evicted", 8, 3.5, "lfu")
    assert str(miss) == "evicted 3.5 s ago by lfu"


def test_a_text_shorter_than_a_block_was_evicted_too() -> None:
    cache, _ = make(4)
    store(cache, array("i", [1, 2, 3]), OWN)
    for index in range(2, 4):
        store(cache, text(index, 4), OWN)
    miss = why(cache, array("i", [1, 2, 3]))
    assert miss is not None
    assert miss.reason == "evicted"


def test_what_was_purged_was_not_evicted() -> None:
    cache, shared = make(4)
    store(cache, text(1, 4), OWN)
    store(cache, text(2, 4), OWN)
    shared.purge_tenant("t")
    assert why(cache, text(1, 4)) == Miss("not seen", 0)
    store(cache, text(1, 4), OWN)
    shared.purge_text(OWN, text(1, 4))
    assert why(cache, text(1, 4)) == Miss("not seen", 0)


@pytest.mark.parametrize("evicted", [False, True])
def test_other_format_while_it_is_there_and_after_it_left(evicted: bool) -> None:
    cache, shared = make(12)
    use_fingerprint(shared, Fingerprint(codec="int8"))
    store(cache, text(1, 4), OWN)
    if evicted:
        store(cache, text(2, 12), OWN)
        assert not any(node.depth == 0 and node.tokens == text(1, 1).tobytes() for node in shared.tree.nodes.values())
    use_fingerprint(shared, Fingerprint(codec="f32"))
    assert why(cache, text(1, 4)) == Miss("other format", 0)
    assert str(why(cache, text(1, 4))) == "same text under another adapter, format or numerics"
    assert why(cache, text(1, 4), CacheOptions("other")) == Miss("not seen", 0)


def test_tier_failed() -> None:
    """A colder tier that cannot deliver tells the look-ups which key it was."""
    cache, shared = make(12)
    store(cache, text(1, 2), OWN)
    key = child_key(shared.chain_of(OWN, text(1, 2))[-1].key, text(1, 3)[8:].tobytes())
    shared.lookups.fail(key, 1.0)
    assert why(cache, text(1, 4)) == Miss("tier failed", 8)
    assert str(why(cache, text(1, 4))) == "a tier failed"
    shared.purge_tenant("t")
    assert why(cache, text(1, 4)) == Miss("not seen", 0)


def test_bypassed() -> None:
    cache, _ = make(12)
    store(cache, text(1, 2), OWN)
    assert why(cache, text(1, 2), CacheOptions("t", bypass=True)) == Miss("bypassed", 0)


@pytest.mark.parametrize("other", [CacheOptions("u"), CacheOptions("t", ""), CacheOptions("t", "x")])
def test_no_reason_tells_of_another_namespace(other: CacheOptions) -> None:
    """Whether stored, evicted, failed or in another format elsewhere: here it was not seen."""
    cache, shared = make(8)
    use_fingerprint(shared, Fingerprint(codec="int8"))
    store(cache, text(1, 4), OWN)
    use_fingerprint(shared, Fingerprint())
    store(cache, text(1, 4), OWN)
    key = shared.chain_of(OWN, text(1, 4))[0].key
    store(cache, text(2, 8), OWN)
    shared.lookups.fail(key, 1.0)
    assert why(cache, text(1, 4), other) == Miss("not seen", 0)


def test_the_memory_of_reasons_is_bounded_by_four_times_the_cache() -> None:
    cache, shared = make(6)
    for index in range(200):
        store(cache, text(index, 5), OWN)
        shared.lookups.fail(bytes([index]) * 32, 1.0)
    assert len(shared.lookups.evicted) == len(shared.lookups.failed) == 24
    cache.moved(cache.moves())
    cache.set_num_blocks(8)
    assert shared.lookups.evicted.capacity == 32
