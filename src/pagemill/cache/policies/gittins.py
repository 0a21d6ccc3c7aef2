"""Gittins: the block leaves whose place earns least, by what was learned of how soon blocks like it are used again.

Owns the classes of blocks and their order; the learning is in `reuse.py`. The class of a block is its number of uses
(ghosts keep it for evicted blocks), the time between its last two uses, and, of a block that was used once, whether it
is full. The idea of ranking by hits per time, from the ages at which blocks of a class hit, is that of LHD (Beckmann et
al., "LHD: improving cache hit rate by maximizing hit density", NSDI 2018); here the ages of evicted blocks count too,
the index looks ahead to the best time to stop, and the victim is exact instead of sampled.
"""

from __future__ import annotations

from bisect import bisect_right
from heapq import heappop, heappush

from pagemill.cache.policies.base import BlockInfo
from pagemill.cache.policies.order import Ghosts, StampedQueue
from pagemill.cache.policies.reuse import ReuseLearner

_GHOSTS_PER_BLOCK = 4
_REFRESHES_PER_CAPACITY = 4
_SOONEST_REFRESH = 500
_AGING_STEP = 256
# Uses 1 (full, part-filled), then for 2, 3, 4, 5-7, 8-15 and more the gap since the use before, in capacities.
_GAPS = (0.25, 2.0, 6.0)
_USES = (2, 3, 4, 5, 8, 16)
_PRIOR_LEVELS = (0.56, 0.056, 1.7, 2.9, 4.0, 6.25, 9.0, 36.0)
_NUM_GAPS = len(_GAPS) + 1
_LEVELS = (*_PRIOR_LEVELS[:2], *(level for level in _PRIOR_LEVELS[2:] for _ in range(_NUM_GAPS)))
_GROUPS = (0, 1, *(2 + each for each in range(len(_USES)) for _ in range(_NUM_GAPS)))


class _Entry:
    """One block. row: its class and bucket of age, as an index of a queue. Mutated by the policy."""

    __slots__ = ("key", "row", "used", "uses")

    def __init__(self, key: bytes, uses: int, used: int) -> None:
        self.key = key
        self.uses = uses
        self.used = used
        self.row = 0


class Gittins:
    """A queue by last use for each class and bucket of age; the first of the queue with the lowest index leaves.

    Mutated by every call. Blocks move to the next bucket as they age (a bounded number of times between two uses), so
    that a call costs O(1) in blocks, amortised, whatever is locked; the index is computed anew four times per capacity.
    """

    name = "gittins"

    def __init__(self, capacity: int) -> None:
        assert capacity > 0
        self._learner = ReuseLearner(capacity, _LEVELS, _GROUPS)
        self._num_buckets = self._learner.num_buckets
        self._gaps = tuple(capacity * gap for gap in _GAPS)
        self._entries: dict[int, _Entry] = {}
        self._ghosts: Ghosts[tuple[int, int]] = Ghosts(_GHOSTS_PER_BLOCK * capacity)
        self._locked: set[int] = set()
        self._most_tokens = 0
        self._now = 0
        self._aged_at = 0
        self._step = min(_AGING_STEP, max(1, self._learner.edges[0] // 4))
        self._period = max(_SOONEST_REFRESH, capacity // _REFRESHES_PER_CAPACITY)
        self._queues = [StampedQueue() for _ in range(len(_LEVELS) * self._num_buckets)]
        self._order: list[int] = []
        self._places = [0] * len(self._queues)
        self._filled: list[int] = []
        self._refresh()

    def insert(self, block: int, key: bytes, info: BlockInfo) -> None:
        assert block not in self._entries, f"block {block} is known already"
        uses, used = self._ghosts.take(key) or (0, 0)
        entry = self._entries[block] = _Entry(key, uses, used)
        self._most_tokens = max(self._most_tokens, info.num_tokens)
        self._use(block, entry, is_full=info.num_tokens == self._most_tokens)

    def touch(self, block: int) -> None:
        assert block in self._entries, f"block {block} is not known"
        entry = self._entries[block]
        if block not in self._locked:
            self._queues[entry.row].discard(block)
        self._use(block, entry, is_full=True)

    def lock(self, block: int) -> None:
        assert block in self._entries, f"block {block} is not known"
        assert block not in self._locked, f"block {block} is locked already"
        self._locked.add(block)
        self._queues[self._entries[block].row].discard(block)

    def unlock(self, block: int) -> None:
        assert block in self._locked, f"block {block} is not locked"
        self._locked.remove(block)
        entry = self._entries[block]
        bucket = self._learner.bucket(self._aged_at - entry.used)
        self._enqueue(block, entry, entry.row - entry.row % self._num_buckets + bucket)

    def victim(self) -> int | None:
        filled = self._filled
        while filled:
            first = self._queues[self._order[filled[0]]].first()
            if first is not None:
                return first[1]
            heappop(filled)
        return None

    def remove(self, block: int, evicted: bool) -> None:
        assert block in self._entries, f"block {block} is not known"
        entry = self._entries.pop(block)
        self._queues[entry.row].discard(block)
        self._locked.discard(block)
        if evicted:
            self._ghosts.put(entry.key, (entry.uses, entry.used))

    def on_miss(self, key: bytes) -> None:
        pass

    def _use(self, block: int, entry: _Entry, *, is_full: bool) -> None:
        self._now += 1
        entry.uses += 1
        if entry.uses == 1:
            kind = 0 if is_full else 1
        else:
            gap = bisect_right(self._gaps, self._now - entry.used)
            kind = 2 + (bisect_right(_USES, entry.uses) - 1) * _NUM_GAPS + gap
        entry.used = self._now
        entry.row = kind * self._num_buckets
        self._learner.record(entry.key, self._now, kind)
        if block not in self._locked:
            self._enqueue(block, entry, entry.row)
        if self._now % self._step == 0:
            self._age()
        if self._now % self._period == 0:
            self._refresh()

    def _enqueue(self, block: int, entry: _Entry, row: int) -> None:
        entry.row = row
        queue = self._queues[row]
        if not queue:
            heappush(self._filled, self._places[row])
        queue.put(block, entry.used)

    def _age(self) -> None:
        """Move blocks whose age has passed the end of their bucket."""
        self._aged_at = self._now
        self._learner.advance(self._now)
        limits = [*(self._now - edge for edge in self._learner.edges), -1]
        for row, queue in enumerate(self._queues):
            first = queue.first()
            limit = limits[row % self._num_buckets]
            while first is not None and first[0] <= limit:
                queue.discard(first[1])
                self._enqueue(first[1], self._entries[first[1]], row + 1)
                first = queue.first()

    def _refresh(self) -> None:
        """Order the queues by the index learned; of equals the older bucket first."""
        table = self._learner.refresh(self._now)
        index = [each for row in table for each in row]
        self._order = sorted(range(len(index)), key=lambda row: (index[row], -(row % self._num_buckets), row))
        for place, row in enumerate(self._order):
            self._places[row] = place
        self._filled = [place for place, row in enumerate(self._order) if self._queues[row]]
