"""GreedyDual-Size-Frequency with ghosts: uses x recompute cost / bytes, above a floor that rises with evictions.

Owns its order. Source: Cherkasova, "Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching", HP Labs
1998. The ghosts (keys of evicted blocks, twice the capacity) keep the uses, so that a block that comes back too late
has not lost its count.
"""

from __future__ import annotations

from pagemill.cache.policies.base import BlockInfo
from pagemill.cache.policies.order import Ghosts, RankedHeap

_GHOSTS_PER_BLOCK = 2


class _Entry:
    """One block: its key, uses, worth of a use, rank. Mutated by the policy."""

    __slots__ = ("key", "rank", "used", "uses", "worth")

    def __init__(self, key: bytes, uses: int, worth: float) -> None:
        self.key = key
        self.uses = uses
        self.worth = worth
        self.rank = 0.0
        self.used = 0


class GDSF:
    """Blocks by rank = floor at the last use + uses x worth. Mutated by every call. A hit costs O(1), a victim
    O(log n)."""

    name = "gdsf"

    def __init__(self, capacity: int) -> None:
        assert capacity > 0
        self._entries: dict[int, _Entry] = {}
        self._order = RankedHeap()
        self._ghosts: Ghosts[int] = Ghosts(_GHOSTS_PER_BLOCK * capacity)
        self._locked: set[int] = set()
        self._floor = 0.0
        self._now = 0

    def insert(self, block: int, key: bytes, info: BlockInfo) -> None:
        assert block not in self._entries, f"block {block} is known already"
        assert info.num_bytes > 0, "a page has bytes"
        uses = (self._ghosts.take(key) or 0) + 1
        entry = self._entries[block] = _Entry(key, uses, info.recompute_cost / info.num_bytes)
        self._place(block, entry)

    def touch(self, block: int) -> None:
        assert block in self._entries, f"block {block} is not known"
        entry = self._entries[block]
        entry.uses += 1
        self._place(block, entry)

    def lock(self, block: int) -> None:
        assert block in self._entries, f"block {block} is not known"
        assert block not in self._locked, f"block {block} is locked already"
        self._locked.add(block)
        self._order.discard(block)

    def unlock(self, block: int) -> None:
        assert block in self._locked, f"block {block} is not locked"
        self._locked.remove(block)
        entry = self._entries[block]
        self._order.put(block, entry.rank, entry.used)

    def victim(self) -> int | None:
        return self._order.first()

    def remove(self, block: int, evicted: bool) -> None:
        assert block in self._entries, f"block {block} is not known"
        entry = self._entries.pop(block)
        self._order.discard(block)
        self._locked.discard(block)
        if evicted:
            self._floor = max(self._floor, entry.rank)
            self._ghosts.put(entry.key, entry.uses)

    def on_miss(self, key: bytes) -> None:
        pass

    def _place(self, block: int, entry: _Entry) -> None:
        self._now += 1
        entry.used = self._now
        entry.rank = self._floor + entry.uses * entry.worth
        if block not in self._locked:
            self._order.put(block, entry.rank, entry.used)
