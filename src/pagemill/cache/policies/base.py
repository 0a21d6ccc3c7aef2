"""What an eviction policy promises. Owns the contract and what a policy is told of a block; each policy is a file.

A policy owns an order of blocks and nothing else: it frees nothing, moves nothing, and counts no tokens. What outranks
it (pins, priorities, time to live, floors and caps of tenants, leaves before their parents) is its caller's, who locks
what may not go. `registry.make_policy` makes one by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """What is known of a block when it is published.

    num_tokens: token positions in it. depth: its index in the chain of blocks from the start of the text. num_bytes: of
    its page. recompute_cost: relative time to compute it again (one block at the start of a text: 1). priority: 0 to
    100 (retention, which callers enforce; a policy may ignore it). namespace: whose it is. parent: key of the block
    before it in its chain, None at the start of a text or where it is not told.
    """

    num_tokens: int = 1
    depth: int = 0
    num_bytes: int = 1
    recompute_cost: float = 1.0
    priority: int = 50
    namespace: int = 0
    parent: bytes | None = None


class Policy(Protocol):
    """An order in which cached blocks leave. Mutated by every method; `victim` twice in a row answers the same.

    * Blocks are small ints that the caller gives out, keys the blocks' content keys. A block is `insert`ed once and is
      known until it is `remove`d.
    * Every call is atomic: one that is refused (AssertionError: a caller's mistake, such as a block inserted twice)
      has changed nothing.
    * Every call costs O(log n) at the most, amortised, with any number of locked blocks about: none is walked past.
    * A block that is locked is never a victim. Locking changes nothing else: hits count as they do unlocked, and an
      unlocked block stands where its hits have put it, not at the end.
    * The same calls give the same victims on every machine: no randomness that is not seeded, no time but the calls.
    """

    name: str

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
