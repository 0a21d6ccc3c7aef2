"""ARC: one list of blocks used once, one of blocks used again, and ghosts of both that shift the room between them.

Owns its order. Source: Megiddo and Modha, "ARC: a self-tuning, low overhead replacement cache", FAST 2003. As blocks
are evicted before their successor is known, the ghosts are cut to size after an eviction instead of before it.
"""

from __future__ import annotations

from pagemill.cache.policies.base import BlockInfo
from pagemill.cache.policies.order import Ghosts, StampedQueue

_ONCE, _AGAIN = 0, 1


class _Entry:
    """One block: its key, its list, its last use. Mutated by the policy."""

    __slots__ = ("key", "queue", "used")

    def __init__(self, key: bytes, queue: int, used: int) -> None:
        self.key = key
        self.queue = queue
        self.used = used


class ARC:
    """Two lists by last use with a target for the first. Mutated by every call. A hit costs O(1)."""

    name = "arc"

    def __init__(self, capacity: int) -> None:
        assert capacity > 0
        self._capacity = capacity
        self._target = 0.0
        self._entries: dict[int, _Entry] = {}
        self._queues = (StampedQueue(), StampedQueue())
        self._sizes = [0, 0]
        self._ghosts: tuple[Ghosts[bool], Ghosts[bool]] = (Ghosts(capacity), Ghosts(2 * capacity))
        self._missed_again = False
        self._locked: set[int] = set()
        self._now = 0

    def insert(self, block: int, key: bytes, info: BlockInfo) -> None:
        assert block not in self._entries, f"block {block} is known already"
        self._now += 1
        known = [ghosts.take(key) is not None for ghosts in self._ghosts]
        queue = _AGAIN if any(known) else _ONCE
        self._entries[block] = _Entry(key, queue, self._now)
        self._sizes[queue] += 1
        self._queues[queue].put(block, self._now)
        self._missed_again = False

    def touch(self, block: int) -> None:
        assert block in self._entries, f"block {block} is not known"
        self._now += 1
        entry = self._entries[block]
        if entry.queue == _ONCE:
            self._queues[_ONCE].discard(block)
            self._sizes[_ONCE] -= 1
            self._sizes[_AGAIN] += 1
            entry.queue = _AGAIN
        entry.used = self._now
        if block not in self._locked:
            self._queues[_AGAIN].put(block, self._now)

    def lock(self, block: int) -> None:
        assert block in self._entries, f"block {block} is not known"
        assert block not in self._locked, f"block {block} is locked already"
        self._locked.add(block)
        self._queues[self._entries[block].queue].discard(block)

    def unlock(self, block: int) -> None:
        assert block in self._locked, f"block {block} is not locked"
        self._locked.remove(block)
        entry = self._entries[block]
        self._queues[entry.queue].put(block, entry.used)

    def victim(self) -> int | None:
        num_once = self._sizes[_ONCE]
        from_once = num_once > self._target or (self._missed_again and num_once == self._target)
        queue = _ONCE if num_once and from_once else _AGAIN
        first = self._queues[queue].first() or self._queues[1 - queue].first()
        return None if first is None else first[1]

    def remove(self, block: int, evicted: bool) -> None:
        assert block in self._entries, f"block {block} is not known"
        entry = self._entries.pop(block)
        self._sizes[entry.queue] -= 1
        self._queues[entry.queue].discard(block)
        self._locked.discard(block)
        if not evicted:
            return
        once, again = self._ghosts
        self._ghosts[entry.queue].put(entry.key, True)
        if self._sizes[_ONCE] + len(once) >= self._capacity:
            once.drop_oldest()
        if sum(self._sizes) + len(once) + len(again) >= 2 * self._capacity:
            again.drop_oldest()

    def on_miss(self, key: bytes) -> None:
        """A miss on a ghost shifts the target towards the list that it left."""
        once, again = self._ghosts
        self._missed_again = key in again
        if key in once:
            self._target = min(self._capacity, self._target + max(1.0, len(again) / len(once)))
        elif self._missed_again:
            self._target = max(0.0, self._target - max(1.0, len(once) / len(again)))
