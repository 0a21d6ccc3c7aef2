"""The invariants of the prefix cache under random operations, for every policy, and a suite that catches broken caches.

Promise of each broken cache's name: the invariant that it breaks; `exercise` must notice within a few seeds.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable

import pytest

from pagemill.base.errors import CapacityError, IntegrityError
from pagemill.base.params import CacheOptions
from pagemill.base.transfer import Copy, Moves
from pagemill.cache import sharing as sharing_module
from pagemill.cache.block import Node
from pagemill.cache.manager import CacheManager
from pagemill.cache.policies.registry import POLICIES
from pagemill.cache.pool import BlockPool
from pagemill.cache.prefix import Match, PrefixTree
from pagemill.cache.sharing import SharedBlocks
from pagemill.cache.tenancy import Tenancy
from tests.contracts.cache.harness import Harness, ViolationError, exercise

SIZES = [3, 6, 12, 30]


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_random_operations_break_no_invariant(policy: str) -> None:
    num_hit = num_operations = 0
    for seed in range(12):
        harness = Harness(num_blocks=SIZES[seed % len(SIZES)], policy=policy)
        exercise(harness, seed, 120)
        num_hit += harness.num_hit
        num_operations += harness.num_operations
    assert num_operations > 1000
    assert num_hit > 50


@pytest.mark.parametrize("seed", range(6))
def test_quotas_hold_under_random_operations(seed: int) -> None:
    harness = Harness(num_blocks=14)
    assert harness.cache.shared is not None
    harness.cache.shared.set_quota("a", 4, None)
    harness.cache.shared.set_quota("b", 0, 6)
    exercise(harness, seed, 150)


def exercise_seeds(count: int) -> None:
    for seed in range(count):
        exercise(Harness(num_blocks=SIZES[seed % len(SIZES)]), seed, 120)


# Deliberately broken caches


def no_wipe(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SharedBlocks, "moves", lambda self: Moves((), tuple(self._copies.values())))


def no_copy(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SharedBlocks, "moves", lambda self: Moves(tuple(self._pool.dirty), ()))


def short_copy(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sharing_module, "Copy", lambda source, target, count: Copy(source, target, count - 1))


def unlocked_in_use(patch: pytest.MonkeyPatch) -> None:
    hold = SharedBlocks.hold

    def broken(self: SharedBlocks, blocks: list[int]) -> None:
        hold(self, blocks)
        for block in blocks:
            node = self.tree.nodes.get(block)
            if node is not None and node.shelf is not None and not node.children and self._pool.num_holders(block) == 1:
                node.shelf.unlock(block)

    patch.setattr(SharedBlocks, "hold", broken)


def unfollowed(patch: pytest.MonkeyPatch) -> None:
    """A parent may be evicted before its child."""
    release = SharedBlocks.release

    def broken(self: SharedBlocks, blocks: list[int]) -> None:
        release(self, blocks)
        for node in list(self.tree.nodes.values()):
            if node.children and not self._pool.num_holders(node.block) and node.shelf is not None:
                node.shelf.unlock(node.block)

    patch.setattr(SharedBlocks, "release", broken)


def longest_common_in_any_order(patch: pytest.MonkeyPatch) -> None:
    """Tails are matched by their number of tokens and not by what they are."""
    find = PrefixTree.find

    def broken(self: PrefixTree, root: Node, tokens: bytes, most: int) -> Match:
        match = find(self, root, tokens, most)
        node = match.nodes[-1] if match.nodes else root
        left = most - len(match.nodes) * self.block_size
        if node.children and left > 0:
            child = next(iter(node.children.values()))
            return Match(root, match.nodes, child, min(left, len(child.tokens) // 4))
        return match

    patch.setattr(PrefixTree, "find", broken)


def hits_everything(patch: pytest.MonkeyPatch) -> None:
    """The last token is found too, and nothing is left to have logits from."""
    find = PrefixTree.find
    patch.setattr(PrefixTree, "find", lambda self, root, tokens, most: find(self, root, tokens, most + 1))


def shares_across_salts(patch: pytest.MonkeyPatch) -> None:
    namespace = Tenancy.namespace
    patch.setattr(Tenancy, "namespace", lambda self, tenant, salt, public: namespace(self, tenant, None, public))


def shares_across_tenants(patch: pytest.MonkeyPatch) -> None:
    namespace = Tenancy.namespace
    patch.setattr(Tenancy, "namespace", lambda self, tenant, salt, public: namespace(self, "all", salt, public))


def publishes_drafts(patch: pytest.MonkeyPatch) -> None:
    """Granted positions count as committed when a block of them is taken back."""
    resize = CacheManager.resize

    def broken(self: CacheManager, seq_id: int, num_tokens: int) -> None:
        sequence = self._sequences[seq_id]
        if num_tokens < sequence.history and sequence.tokens is not None and len(sequence.tokens) == sequence.history:
            committed = sequence.committed
            sequence.committed = sequence.history
            self.publish_tail(seq_id)
            sequence.committed = committed
        resize(self, seq_id, num_tokens)

    patch.setattr(CacheManager, "resize", broken)


def leaks_on_close(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CacheManager, "_release", lambda self, blocks: self.shared.release(blocks[:-1]))


def frees_twice(patch: pytest.MonkeyPatch) -> None:
    drop = BlockPool._drop

    def broken(self: BlockPool, block: int) -> None:
        drop(self, block)
        self._num_free += 1

    patch.setattr(BlockPool, "_drop", broken)


def promises_too_much(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CacheManager, "can_open", lambda self, *args: True)


def forgets_events(patch: pytest.MonkeyPatch) -> None:
    discard = SharedBlocks.discard

    def broken(self: SharedBlocks, node: Node, *, evicted: bool = False) -> None:
        told, self.on_event = self.on_event, None
        discard(self, node, evicted=evicted)
        self.on_event = told

    patch.setattr(SharedBlocks, "discard", broken)


def failure_changes_something(patch: pytest.MonkeyPatch) -> None:
    enter = SharedBlocks.enter

    def broken(self: SharedBlocks, entry: object) -> array[int]:
        for block in list(self.tree.nodes):
            node = self.tree.nodes[block]
            if not self._pool.num_holders(block) and not node.children:
                self.discard(node)
                break
        return enter(self, entry)  # type: ignore[arg-type]

    patch.setattr(SharedBlocks, "enter", broken)


def purge_leaves_the_tree(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SharedBlocks, "purge", lambda self, node: 0)


def pins_end_at_once(patch: pytest.MonkeyPatch) -> None:
    def broken(self: SharedBlocks, options: CacheOptions, tokens: array[int], seconds: float) -> object:
        lease = pin(self, options, tokens, seconds)
        self.unpin(lease.lease_id)
        return lease

    pin = SharedBlocks.pin
    patch.setattr(SharedBlocks, "pin", broken)


BROKEN: list[Callable[[pytest.MonkeyPatch], None]] = [
    no_wipe, no_copy, short_copy, unlocked_in_use, unfollowed, longest_common_in_any_order, hits_everything,
    shares_across_salts, shares_across_tenants, publishes_drafts, leaks_on_close, frees_twice, promises_too_much,
    forgets_events, failure_changes_something, purge_leaves_the_tree, pins_end_at_once,
]  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN, ids=lambda each: each.__name__)
def test_a_broken_cache_is_caught(
    broken: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch)
    with pytest.raises((ViolationError, AssertionError, IntegrityError, CapacityError, KeyError)):
        exercise_seeds(40)
