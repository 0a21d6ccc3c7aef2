"""A cache that contradicts itself: everything is dropped, wiped and computed again; requests and the engine live on."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable

import pytest

from pagemill.base.errors import IntegrityError
from pagemill.base.params import CacheOptions, SamplingParams
from pagemill.cache.entry import Removed, SharingConfig, Stored
from pagemill.cache.manager import CacheManager
from pagemill.cache.sharing import SharedBlocks
from tests.fixtures.fake_engine import Rig
from tests.fixtures.fake_executor import answer

PROMPTS = [list(range(10 * i, 10 * i + 9)) + [1] * i for i in range(4)]
NUM_TOKENS = 30

Damage = Callable[[Rig, SharedBlocks], None]


def counts(rig: Rig, _: SharedBlocks) -> None:
    rig.cache._pool._num_free += 1


def references(rig: Rig, _: SharedBlocks) -> None:
    rig.cache._pool.num_references -= 1


def no_holder(rig: Rig, _: SharedBlocks) -> None:
    [*_, sequence] = rig.cache._sequences.values()
    rig.cache._pool._refs[sequence.table[-1]] = 0


def one_holder_too_many(rig: Rig, _: SharedBlocks) -> None:
    [*_, sequence] = rig.cache._sequences.values()
    rig.cache._pool.retain([sequence.table[0]])


def unpublished(rig: Rig, shared: SharedBlocks) -> None:
    rig.cache._pool.published[next(iter(shared.tree.nodes))] = 0


def unknown_block(_: Rig, shared: SharedBlocks) -> None:
    shared.tree.nodes.pop(next(iter(shared.tree.nodes)))


def other_block(_: Rig, shared: SharedBlocks) -> None:
    first, second, *_ = shared.tree.nodes.values()
    first.block, second.block = second.block, first.block


def no_place_in_the_order(_: Rig, shared: SharedBlocks) -> None:
    for node in shared.tree.nodes.values():
        assert node.shelf is not None
        node.shelf.remove(node.handle, False)


def miscounted_account(_: Rig, shared: SharedBlocks) -> None:
    shared.tenancy.accounts[0].cached -= 3


def locked_for_ever(_: Rig, shared: SharedBlocks) -> None:
    for node in shared.tree.nodes.values():
        if node.shelf is not None and not node.children:
            node.shelf.victim = node.shelf.evict = lambda: None  # type: ignore[method-assign]


def broken_list(rig: Rig, _: SharedBlocks) -> None:
    pool = rig.cache._pool
    pool._num_free, pool._num_cached = pool._num_free + 2, pool._num_cached - 2


DAMAGES: list[Damage] = [
    counts, references, no_holder, one_holder_too_many, unpublished, unknown_block, other_block, no_place_in_the_order,
    miscounted_account, locked_for_ever, broken_list,
]  # fmt: skip


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A rig verifies after each step, which a cache that is damaged on purpose cannot pass."""
    monkeypatch.setattr(CacheManager, "verify", lambda self: None)
    return monkeypatch


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda each: each.__name__)
def test_a_contradiction_is_dropped_and_computed_again(
    damage: Damage, caplog: pytest.LogCaptureFixture, unverified: pytest.MonkeyPatch
) -> None:
    rig = Rig(30, 4, vocab_size=200, sharing=SharingConfig())
    shared = rig.cache.shared
    assert shared is not None
    rig.add("warm", list(range(100, 160)), max_tokens=2)
    rig.run()
    for index, prompt in enumerate(PROMPTS):
        rig.add(f"r{index}", prompt, max_tokens=NUM_TOKENS)
    for _ in range(6):
        rig.step()
    damage(rig, shared)
    with caplog.at_level(logging.ERROR):
        while rig.engine.has_unfinished:
            rig.step()
        for index in range(rig.cache.num_blocks):  # what nobody meets, the patrol finds
            rig.add(f"patrol {index}", [7, 8, 9], max_tokens=1)
            while rig.engine.has_unfinished:
                rig.step()
    unverified.undo()
    for index, prompt in enumerate(PROMPTS):
        assert rig.answers[f"r{index}", 0].finish_reason == "length"
        assert rig.tokens(f"r{index}") == answer(prompt, NUM_TOKENS, 200)
    stats = rig.cache.stats()
    assert stats.num_rebuilds == 1
    assert stats.num_quarantined_blocks > 0
    assert "dropped and computed again" in caplog.text
    rig.cache.verify()
    rig.num_rebuilds = 1
    rig.assert_empty()


def test_a_hit_on_a_damaged_block_is_never_served() -> None:
    rig = Rig(20, 4, vocab_size=200, sharing=SharingConfig())
    rig.add("a", range(12), max_tokens=2)
    rig.run()
    shared = rig.cache.shared
    assert shared is not None
    node = next(iter(shared.tree.nodes.values()))
    rig.cache._pool.published[node.block] = 0
    with pytest.raises(IntegrityError, match="not what its block holds"):
        shared.entry(CacheOptions(), array("i", range(12)), 12)


@pytest.mark.usefixtures("unverified")
def test_ending_a_sequence_of_a_damaged_cache_gets_through_and_is_remembered() -> None:
    rig = Rig(20, 4, vocab_size=200, sharing=SharingConfig())
    rig.add("a", range(12), max_tokens=5)
    rig.step()
    [sequence] = rig.cache._sequences.values()
    rig.cache._pool._refs[sequence.table[0]] = 0
    [last] = rig.abort("a")
    assert last.finish_reason == "abort"
    with pytest.raises(IntegrityError, match="closing sequence 1"):
        rig.cache.check()
    rig.add("b", range(12), max_tokens=5)
    rig.num_rebuilds = 1
    rig.run()
    assert rig.tokens("b") == answer(range(12), 5, 200)


def test_damage_that_comes_back_ends_the_requests_and_not_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(20, 4, vocab_size=200, sharing=SharingConfig())

    def contradicts(_: CacheManager) -> None:
        raise IntegrityError("again")

    monkeypatch.setattr(CacheManager, "check", contradicts)
    monkeypatch.setattr(CacheManager, "verify", lambda self: None)
    rig.add("a", range(12), max_tokens=5)
    for _ in range(10):
        rig.step()
    assert not rig.engine.has_unfinished
    assert isinstance(rig.answers["a", 0].deltas[-1].error, IntegrityError)
    monkeypatch.undo()
    rig.add("b", range(12), max_tokens=5)
    rig.num_rebuilds = rig.cache.stats().num_rebuilds
    rig.run()
    assert rig.tokens("b") == answer(range(12), 5, 200)


def test_a_rebuild_keeps_quotas_and_secrets_ends_pins_wipes_and_tells_of_every_block() -> None:
    rig = Rig(20, 4, vocab_size=200, sharing=SharingConfig())
    shared = rig.cache.shared
    assert shared is not None
    events: list[Stored | Removed] = []
    shared.on_event = events.append
    shared.set_quota("t", 2, 9)
    shared.tenancy.declare_public("docs")
    params = SamplingParams(max_tokens=2, temperature=0.0, seed=0)
    rig.engine.add_request("a", range(12), params, cache=CacheOptions("t"))
    rig.run()
    shared.pin(CacheOptions("t"), array("i", range(12)), 100.0)
    keys = set(shared.tree.index)
    root = shared.entry(CacheOptions("t"), array("i", range(12)), 12).match.root.key
    rig.cache.rebuild()
    rig.cache.verify()
    assert {each.key for each in events if isinstance(each, Removed)} == keys
    stats = rig.cache.stats()
    assert (stats.num_free_blocks, stats.num_pinned_blocks, shared.leases.num_forced) == (20, 0, 1)
    account = shared.account_of(CacheOptions("t"))
    assert (account.floor, account.cap, account.used) == (2, 9, 0)
    assert shared.entry(CacheOptions("t"), array("i", range(12)), 12).match.root.key == root
    assert shared.account_of(CacheOptions(public="docs")).used == 0
    assert set(rig.cache.moves().wipes) == set(range(4)), "pages that were never taken hold nothing"


@pytest.mark.parametrize("mode", ["paged", "contiguous", "none"])
def test_modes_that_share_nothing_are_rebuilt_too(mode: str) -> None:
    rig = Rig(40, 4, mode, vocab_size=200, max_model_len=64)  # type: ignore[arg-type]
    rig.add("a", range(12), max_tokens=9)
    for _ in range(3):
        rig.step()
    rig.cache._pool.num_references += 1
    rig.num_rebuilds = 1
    rig.step()
    rig.run()
    assert rig.tokens("a") == answer(range(12), 9, 200)
