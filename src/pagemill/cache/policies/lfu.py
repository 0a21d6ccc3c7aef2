"""Least frequently used. Owns its order: fewest hits first, among equals the one whose last hit is longest ago.

Counts live as long as the block and do not age, so that a load that moves on is followed slowly: a reference point
rather than a choice.
"""

from __future__ import annotations

from heapq import heappop, heappush

from pagemill.cache.policies.base import BlockInfo
from pagemill.cache.policies.order import StampedQueue


class LFU:
    """A queue for each number of hits. Mutated by every call. A hit costs O(log of different counts) at the most."""

    name = "lfu"

    def __init__(self, capacity: int) -> None:
        assert capacity > 0
        self._uses: dict[int, tuple[int, int]] = {}
        self._queues: dict[int, StampedQueue] = {}
        self._counts: list[int] = []
        self._locked: set[int] = set()
        self._now = 0

    def insert(self, block: int, key: bytes, info: BlockInfo) -> None:
        assert block not in self._uses, f"block {block} is known already"
        self._now += 1
        self._uses[block] = (1, self._now)
        self._enqueue(block)

    def touch(self, block: int) -> None:
        assert block in self._uses, f"block {block} is not known"
        self._now += 1
        count = self._uses[block][0]
        locked = block in self._locked
        if not locked:
            self._queues[count].discard(block)
        self._uses[block] = (count + 1, self._now)
        if not locked:
            self._enqueue(block)

    def lock(self, block: int) -> None:
        assert block in self._uses, f"block {block} is not known"
        assert block not in self._locked, f"block {block} is locked already"
        self._locked.add(block)
        self._queues[self._uses[block][0]].discard(block)

    def unlock(self, block: int) -> None:
        assert block in self._locked, f"block {block} is not locked"
        self._locked.remove(block)
        self._enqueue(block)

    def victim(self) -> int | None:
        while self._counts:
            first = self._queues[self._counts[0]].first()
            if first is not None:
                return first[1]
            del self._queues[heappop(self._counts)]
        return None

    def remove(self, block: int, evicted: bool) -> None:
        assert block in self._uses, f"block {block} is not known"
        count, _ = self._uses.pop(block)
        if block in self._locked:
            self._locked.remove(block)
        else:
            self._queues[count].discard(block)

    def on_miss(self, key: bytes) -> None:
        pass

    def _enqueue(self, block: int) -> None:
        count, used = self._uses[block]
        queue = self._queues.get(count)
        if queue is None:
            queue = self._queues[count] = StampedQueue()
            heappush(self._counts, count)
        queue.put(block, used)
