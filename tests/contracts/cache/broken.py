"""Deliberately broken caches for each invariant of the prefix cache: what `exercise` must notice within a few seeds.

Each is a function that breaks the product by a patch; its name says what is wrong then. The invariants by number:

1 free + cached + active + held = total. 2 A failed operation changes nothing. 3 No block is a victim while locked,
pinned or in flight. 4 Victims leave in the order of a slow model. 5 What a hit returns is what an uncached run would
have written. 6 Logits after a hit equal logits without it. 7 Equal namespaces and tokens share, different ones never
do. 8 Rolled-back draft tokens are never hit. 9 The end of a sequence in any state leaks nothing. 10 A failed, short,
corrupt or late read of a tier never becomes a hit. 11 What admission predicts is what allocation takes. 12 Replaying
the events reproduces the index.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import pytest

from pagemill.base.params import CacheOptions
from pagemill.base.transfer import Copy, Moves
from pagemill.cache import sharing as sharing_module
from pagemill.cache.block import Node
from pagemill.cache.entry import Removed, Stored
from pagemill.cache.keys import chain_keys
from pagemill.cache.manager import CacheManager
from pagemill.cache.policies import registry
from pagemill.cache.policies.base import OneByOne
from pagemill.cache.policies.lru import LRU
from pagemill.cache.pool import BlockPool
from pagemill.cache.prefix import Match, PrefixTree
from pagemill.cache.publishing import Publisher
from pagemill.cache.sequences import SequenceBlocks
from pagemill.cache.sharing import SharedBlocks
from pagemill.cache.tenancy import Tenancy
from pagemill.kernels import policies


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

    def broken(self: BlockPool, blocks: list[int]) -> None:
        drop(self, blocks)
        self._num_free += len(blocks)

    patch.setattr(BlockPool, "_drop", broken)


def promises_too_much(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CacheManager, "can_open", lambda self, *args: True)


def forgets_events(patch: pytest.MonkeyPatch) -> None:
    tell = SharedBlocks._tell

    def broken(self: SharedBlocks, event: Stored | Removed) -> None:
        if isinstance(event, Stored):
            tell(self, event)

    patch.setattr(SharedBlocks, "_tell", broken)


def failure_changes_something(patch: pytest.MonkeyPatch) -> None:
    enter = SharedBlocks.enter

    def broken(self: SharedBlocks, entry: object, again: bool = False) -> array[int]:
        for block in list(self.tree.nodes):
            node = self.tree.nodes[block]
            if not self._pool.num_holders(block) and not node.children:
                self.discard(node, "purge")
                break
        return enter(self, entry, again)  # type: ignore[arg-type]

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


def misses_tails(patch: pytest.MonkeyPatch) -> None:
    """Hits end at whole blocks, although more is there."""
    find = PrefixTree.find

    def broken(self: PrefixTree, root: Node, tokens: bytes, most: int) -> Match:
        match = find(self, root, tokens, most)
        return Match(match.root, match.nodes)

    patch.setattr(PrefixTree, "find", broken)


class _Latest(LRU):
    def victim(self) -> int | None:
        idle = [block for block in self._lane.order if block not in self._locked]
        return idle[-1] if idle else None

    evict_run = OneByOne.evict_run


class _Forgetful(LRU):
    """Blocks leave first in, first out."""

    def touch(self, block: int) -> None: ...

    def touch_all(self, blocks: Sequence[int]) -> None: ...


def _in_place_of_lru(patch: pytest.MonkeyPatch, policy: type[LRU]) -> None:
    """Under its name in both forms."""
    for makers in (registry.POLICIES, policies.POLICIES):
        patch.setitem(makers, "lru", policy)  # type: ignore[arg-type]


def evicts_the_latest(patch: pytest.MonkeyPatch) -> None:
    _in_place_of_lru(patch, _Latest)


def forgets_hits(patch: pytest.MonkeyPatch) -> None:
    _in_place_of_lru(patch, _Forgetful)


def stores_under_another_key(patch: pytest.MonkeyPatch) -> None:
    """The last token of a block is not part of its key."""
    add = PrefixTree.add_run

    def broken(
        self: PrefixTree, parent: Node, blocks: Sequence[int], tokens: Sequence[bytes], keys: Sequence[bytes] = ()
    ) -> list[Node]:
        return add(self, parent, blocks, tokens, chain_keys(parent.key, [each[:-4] for each in tokens]))

    patch.setattr(PrefixTree, "add_run", broken)


def reads_through_an_old_table(patch: pytest.MonkeyPatch) -> None:
    """Steps go on reading a sequence's own block when that was exchanged for one that another has published."""
    exchange, block_table = Publisher._exchange, CacheManager.block_table
    old: dict[int, tuple[array[int], dict[int, int]]] = {}  # by id of a table, which is kept: its blocks by index

    def broken(self: Publisher, sequence: SequenceBlocks, index: int, there: Node) -> None:
        old.setdefault(id(sequence.table), (sequence.table, {}))[1][index] = sequence.table[index]
        exchange(self, sequence, index, there)

    def broken_table(self: CacheManager, seq_id: int) -> array[int]:
        table = block_table(self, seq_id)
        before = old[id(table)][1] if id(table) in old else {}
        return array("i", [before.get(index, block) for index, block in enumerate(table)])

    patch.setattr(Publisher, "_exchange", broken)
    patch.setattr(CacheManager, "block_table", broken_table)


Broken = Callable[[pytest.MonkeyPatch], None]

BROKEN: dict[int, list[Broken]] = {
    1: [frees_twice],
    2: [failure_changes_something],
    3: [unlocked_in_use, unfollowed, pins_end_at_once],
    4: [evicts_the_latest, forgets_hits],
    5: [no_copy, short_copy, longest_common_in_any_order, misses_tails],
    6: [hits_everything, reads_through_an_old_table],
    7: [shares_across_salts, shares_across_tenants, stores_under_another_key],
    8: [publishes_drafts],
    9: [leaks_on_close],
    11: [promises_too_much],
    12: [forgets_events],
}
UNTESTED = {10: "no tiers yet"}
# Promises without a number, by what is said when one is broken.
BESIDE: dict[str, list[Broken]] = {
    "was handed out with its contents": [no_wipe],
    "something is left at the end|was hit in .* and never verified": [purge_leaves_the_tree],
}
ALL: list[Broken] = [each for found in (*BROKEN.values(), *BESIDE.values()) for each in found]
# What is said when an invariant is broken: a regular expression.
MESSAGES = {
    1: "blocks are not the .* that exist",
    2: "a failed .* changed something",
    3: "is a victim while pinned, in use or followed",
    4: "was evicted before others whose last use is longer ago",
    5: "of the hit of .* holds|found other than",
    6: "logits after .* uncached|leaves nothing to compute",
    7: "that no sequence of its namespace has written|another length than its text's",
    8: "that no sequence of its namespace has written",
    9: "lost count of its blocks",
    11: "admission promised what allocation did not find",
    12: "the replayed events are not the index",
}
