"""What an eviction policy promises. Owns the contract and what a policy is told of a block; each policy is a file.

A policy owns an order of blocks and nothing else: it frees nothing, moves nothing, and counts no tokens. What outranks
it (pins, priorities, time to live, floors and caps of tenants, leaves before their parents) is its caller's, who locks
what may not go. `registry.make_policy` makes one by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """What is known of a block when it is published.

    num_tokens: token positions in it. depth: its index in the chain of blocks from the start of the text. num_bytes: of
    its page. recompute_cost: relative time to compute it again (one block at the start of a text: 1). priority: 0 to
    100 (retention, which callers enforce; a policy may ignore it). namespace: whose it is. parent: key of the block
    before it in its chain, None at the start of a text or where it is not told. text_tokens: length of the text that it
    came in with, 0 where it is not told. num_known_blocks: how many blocks of that text were found when it came.
    """

    num_tokens: int = 1
    depth: int = 0
    num_bytes: int = 1
    recompute_cost: float = 1.0
    priority: int = 50
    namespace: int = 0
    parent: bytes | None = None
    text_tokens: int = 0
    num_known_blocks: int = 0


class Policy(Protocol):
    """An order in which cached blocks leave. Mutated by every method; `victim` twice in a row answers the same.

    * Blocks are small ints that the caller gives out, keys the blocks' content keys. A block is `insert`ed once and is
      known until it is `remove`d.
    * Every call is atomic: one that is refused (AssertionError: a caller's mistake, such as a block inserted twice)
      has changed nothing.
    * Every call but `resize` costs O(log n) for each block at the most, amortised, with any number of locked blocks
      about: one that stands where a victim is looked for is set aside, once between two uses of it.
    * A block that is locked is never a victim. Locking changes nothing else: hits count as they do unlocked, and an
      unlocked block stands where its hits have put it, not at the end.
    * The same calls give the same victims on every machine: no randomness that is not seeded, no time but the calls.
    """

    name: str

    def __contains__(self, block: int) -> bool:
        """True where the block is known."""
        ...

    def insert(self, block: int, key: bytes, info: BlockInfo) -> None:
        """A block has been published. It is unlocked. A key that was evicted lately may be given credit for it."""
        ...

    def touch(self, block: int) -> None:
        """A hit on a known block, locked or not."""
        ...

    def lock(self, block: int) -> None:
        """The block is in use or pinned. Called when the caller's count of reasons leaves 0."""
        ...

    def unlock(self, block: int) -> None:
        """The last reason is gone."""
        ...

    def victim(self) -> int | None:
        """The unlocked block to evict next; None where there is none. It stays until `remove`."""
        ...

    def remove(self, block: int, evicted: bool) -> None:
        """The block's contents are gone. evicted: for want of room, so that its key may be remembered; otherwise
        (purge, time to live, tenant gone) nothing of it is."""
        ...

    def on_miss(self, key: bytes) -> None:
        """A key was looked for and not found. Called before the key's `insert`, if that comes at all."""
        ...

    def touch_all(self, blocks: Sequence[int]) -> None:
        """`touch` for each, in order. Different blocks, all known."""
        ...

    def replace(self, blocks: Sequence[int], keys: Sequence[bytes], infos: Sequence[BlockInfo]) -> list[int]:
        """For each of a run of missing blocks in turn: its key's `on_miss`, then the victim leaves (evicted) and the
        block is inserted. Different blocks, none of them known. Returns the victims in order, which may contain blocks
        of this same run. Refused where nothing is unlocked."""
        ...

    def exchange(
        self, victims: Sequence[int], blocks: Sequence[int], keys: Sequence[bytes], infos: Sequence[BlockInfo]
    ) -> None:
        """`replace` where another policy has named the victims: for each block in turn its key's `on_miss`, then the
        victim in its place leaves (evicted) and the block is inserted. Different blocks, none of them known; different
        victims, known by then."""
        ...

    def admit(self, blocks: Sequence[int], keys: Sequence[bytes], infos: Sequence[BlockInfo]) -> None:
        """A run of blocks has been published, each behind the one before it, and is in use: `insert` and `lock` for
        each. They count as used from the last to the first. Different blocks, none of them known."""
        ...

    def evict_run(self, blocks: Sequence[int]) -> int:
        """The victim and blocks that it keeps locked leave: `remove` with evicted. blocks: the victim, then blocks each
        of which is locked for the one before it alone: it is unlocked when that has left, and leaves if it is then the
        victim. Returns how many have left; if not all of them, the next one is unlocked. Refused where the first is not
        the victim."""
        ...

    def resize(self, capacity: int) -> None:
        """The cache has room for `capacity` blocks (> 0) from now on. Blocks, locks and uses stay; O(n) at the most."""
        ...


class OneByOne:
    """The calls for many blocks, made of the calls for one. Policies derive from it and may do better."""

    def touch_all(self: Policy, blocks: Sequence[int]) -> None:
        assert all(map(self.__contains__, blocks)), "a block is not known"
        for block in blocks:
            self.touch(block)

    def replace(self: Policy, blocks: Sequence[int], keys: Sequence[bytes], infos: Sequence[BlockInfo]) -> list[int]:
        assert not any(map(self.__contains__, blocks)), "a block is known already"
        assert not blocks or self.victim() is not None, "every block is locked"
        victims = []
        for block, key, info in zip(blocks, keys, infos, strict=True):
            self.on_miss(key)
            victim = self.victim()
            assert victim is not None, "every block is locked"
            self.remove(victim, True)
            self.insert(block, key, info)
            victims.append(victim)
        return victims

    def exchange(
        self: Policy, victims: Sequence[int], blocks: Sequence[int], keys: Sequence[bytes], infos: Sequence[BlockInfo]
    ) -> None:
        assert not any(map(self.__contains__, blocks)), "a block is known already"
        known = set(blocks)
        assert all(each in known or each in self for each in victims), "a victim is not known"
        for victim, block, key, info in zip(victims, blocks, keys, infos, strict=True):
            self.on_miss(key)
            self.remove(victim, True)
            self.insert(block, key, info)

    def admit(self: Policy, blocks: Sequence[int], keys: Sequence[bytes], infos: Sequence[BlockInfo]) -> None:
        assert not any(map(self.__contains__, blocks)), "a block is known already"
        for block, key, info in zip(reversed(blocks), reversed(keys), reversed(infos), strict=True):
            self.insert(block, key, info)
            self.lock(block)

    def evict_run(self: Policy, blocks: Sequence[int]) -> int:
        assert self.victim() == blocks[0], f"block {blocks[0]} is not the victim"
        self.remove(blocks[0], True)
        for count, block in enumerate(blocks[1:], 1):
            self.unlock(block)
            if self.victim() != block:
                return count
            self.remove(block, True)
        return len(blocks)
