"""S3-FIFO: a small queue filters what is used once, a main queue keeps the rest, ghosts tell who came back too late.

Owns its order. Source: Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023: small queue 10 %,
ghosts as many as the main queue has room for, counts up to 3.
"""

from __future__ import annotations

from pagemill.cache.policies.base import BlockInfo
from pagemill.cache.policies.order import Ghosts, StampedQueue

_SMALL_SHARE = 0.1
_MOST_USES = 3
_SMALL, _MAIN = 0, 1


class _Entry:
    """One block: its key, its queue, its place there, its uses. Mutated by the policy."""

    __slots__ = ("key", "queue", "stamp", "uses")

    def __init__(self, key: bytes, queue: int, stamp: int) -> None:
        self.key = key
        self.queue = queue
        self.stamp = stamp
        self.uses = 0


class S3FIFO:
    """Two queues and ghosts. Mutated by every call; a hit only counts, blocks move when a victim is looked for."""

    name = "s3fifo"

    def __init__(self, capacity: int) -> None:
        assert capacity > 0
        self._room_small = max(1, int(capacity * _SMALL_SHARE))
        self._ghosts: Ghosts[bool] = Ghosts(max(1, capacity - self._room_small))
        self._entries: dict[int, _Entry] = {}
        self._queues = (StampedQueue(), StampedQueue())
        self._sizes = [0, 0]
        self._locked: set[int] = set()
        self._now = 0

    def insert(self, block: int, key: bytes, info: BlockInfo) -> None:
        assert block not in self._entries, f"block {block} is known already"
        self._now += 1
        queue = _SMALL if self._ghosts.take(key) is None else _MAIN
        self._entries[block] = _Entry(key, queue, self._now)
        self._sizes[queue] += 1
        self._queues[queue].put(block, self._now)

    def touch(self, block: int) -> None:
        assert block in self._entries, f"block {block} is not known"
        entry = self._entries[block]
        if entry.uses < _MOST_USES:
            entry.uses += 1

    def lock(self, block: int) -> None:
        assert block in self._entries, f"block {block} is not known"
        assert block not in self._locked, f"block {block} is locked already"
        self._locked.add(block)
        self._queues[self._entries[block].queue].discard(block)

    def unlock(self, block: int) -> None:
        assert block in self._locked, f"block {block} is not locked"
        self._locked.remove(block)
        entry = self._entries[block]
        self._queues[entry.queue].put(block, entry.stamp)

    def victim(self) -> int | None:
        """Moves blocks that have earned it to the main queue's end on the way: at most four moves for each hit."""
        small, main = self._queues
        while True:
            queue = _SMALL if self._sizes[_SMALL] >= self._room_small else _MAIN
            if not self._queues[queue]:
                queue = 1 - queue
            first = self._queues[queue].first()
            if first is None:
                return None
            block = first[1]
            entry = self._entries[block]
            if entry.uses <= (1 if queue == _SMALL else 0):
                return block
            self._now += 1
            entry.stamp = self._now
            if queue == _SMALL:
                small.discard(block)
                entry.queue, entry.uses = _MAIN, 0
                self._sizes[_SMALL] -= 1
                self._sizes[_MAIN] += 1
            else:
                entry.uses -= 1
            main.put(block, entry.stamp)

    def remove(self, block: int, evicted: bool) -> None:
        assert block in self._entries, f"block {block} is not known"
        entry = self._entries.pop(block)
        self._sizes[entry.queue] -= 1
        self._queues[entry.queue].discard(block)
        self._locked.discard(block)
        if evicted and entry.queue == _SMALL:
            self._ghosts.put(entry.key, True)

    def on_miss(self, key: bytes) -> None:
        pass
