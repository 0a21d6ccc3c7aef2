"""Least recently used. Owns its order: the block whose last hit is longest ago leaves first."""

from __future__ import annotations

from pagemill.cache.policies.base import BlockInfo
from pagemill.cache.policies.order import StampedQueue


class LRU:
    """Blocks in order of their last use. Mutated by every call. A hit costs O(1)."""

    name = "lru"

    def __init__(self, capacity: int) -> None:
        assert capacity > 0
        self._used: dict[int, int] = {}
        self._order = StampedQueue()
        self._locked: set[int] = set()
        self._now = 0

    def insert(self, block: int, key: bytes, info: BlockInfo) -> None:
        assert block not in self._used, f"block {block} is known already"
        self._now += 1
        self._used[block] = self._now
        self._order.put(block, self._now)

    def touch(self, block: int) -> None:
        assert block in self._used, f"block {block} is not known"
        self._now += 1
        self._used[block] = self._now
        if block not in self._locked:
            self._order.put(block, self._now)

    def lock(self, block: int) -> None:
        assert block in self._used, f"block {block} is not known"
        assert block not in self._locked, f"block {block} is locked already"
        self._locked.add(block)
        self._order.discard(block)

    def unlock(self, block: int) -> None:
        assert block in self._locked, f"block {block} is not locked"
        self._locked.remove(block)
        self._order.put(block, self._used[block])

    def victim(self) -> int | None:
        first = self._order.first()
        return None if first is None else first[1]

    def remove(self, block: int, evicted: bool) -> None:
        assert block in self._used, f"block {block} is not known"
        del self._used[block]
        self._order.discard(block)
        self._locked.discard(block)

    def on_miss(self, key: bytes) -> None:
        pass
