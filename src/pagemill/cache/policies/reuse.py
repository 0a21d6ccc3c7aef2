"""How soon blocks of a class are used again, learned from the stream of uses. Owns the estimate and its index.

For each class of blocks, ages (uses of any block since a block's last one) fall into buckets that widen. The learner
counts how many blocks of a class reached a bucket and how many were used again in it, evicted or not, which gives a
hazard for each bucket (Kaplan and Meier, 1958). The index of a class and an age is the best ratio, over all
times to stop, of hits expected by then to the time held (Gittins, 1979): what a place in the cache earns with it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from zlib import crc32

# In capacities; each edge is sqrt 2 times the one before.
_FIRST_EDGE = 0.5
_NUM_EDGES = 9
_SAMPLED = 2048
_HALF_LIFE = 24.0
_SHAPE_WEIGHT, _LEVEL_WEIGHT, _GROUP_WEIGHT = 40_000.0, 800.0, 160.0
_PRIOR_HAZARD, _PRIOR_AGE = 0.12, 0.3


class ReuseLearner:
    """Counts of reuse by class and age. Mutated by `record` and `refresh`.

    capacity: blocks of the cache, the unit of ages. levels: for each class, how often its blocks are expected to be
    used again relative to the others, before anything is seen. groups: for each, the group whose level it leans on.
    Memory is bounded: of a large cache a sample of the keys is followed, up to 8 times the capacity of uses back.
    """

    def __init__(self, capacity: int, levels: Sequence[float], groups: Sequence[int]) -> None:
        edges = [max(1, int(capacity * _FIRST_EDGE))]
        for step in range(1, _NUM_EDGES):
            edges.append(max(edges[-1] + 1, int(capacity * _FIRST_EDGE * 2 ** (step / 2))))
        self.edges = tuple(edges)
        self.num_buckets = len(edges) + 1
        self._widths = (edges[0], *(b - a for a, b in pairwise(edges)), edges[-1])
        self._levels = tuple(levels)
        self._groups = tuple(groups)
        self._modulus = max(1, capacity // _SAMPLED)
        self._latest: dict[bytes, tuple[int, int]] = {}
        self._log: deque[tuple[bytes, int, int]] = deque()
        self._dropped = 0
        self._passed = [0] * len(edges)
        self._hits = [[0.0] * self.num_buckets for _ in self._levels]
        self._reached = [[0.0] * self.num_buckets for _ in self._levels]
        # A prior reuse that thins out with age, in the proportion of a heavy tail.
        bounds = (*edges, 2 * edges[-1])
        self._prior = [
            min(0.5, _PRIOR_HAZARD * width / (bound + _PRIOR_AGE * capacity))
            for width, bound in zip(self._widths, bounds, strict=True)
        ]
        self._half_life_uses = _HALF_LIFE * capacity
        self._decayed_at = 0

    def bucket(self, age: int) -> int:
        """The bucket of an age in uses."""
        return bisect_right(self.edges, age)

    def record(self, key: bytes, now: int, kind: int) -> None:
        """A block of class `kind` is used, at use number `now` (which grows)."""
        if self._modulus > 1 and crc32(key) % self._modulus:
            return
        before = self._latest.get(key)
        if before is not None:
            self._hits[before[1]][bisect_right(self.edges, now - before[0])] += 1.0
        self._latest[key] = (now, kind)
        self._log.append((key, now, kind))
        self._reached[kind][0] += 1.0

    def advance(self, now: int) -> None:
        """Blocks have grown older: count those that reached the next bucket."""
        log, latest, last = self._log, self._latest, len(self.edges) - 1
        for bucket, edge in enumerate(self.edges):
            at, limit = self._passed[bucket] - self._dropped, now - edge
            while at < len(log) and log[at][1] <= limit:
                key, used, kind = log[at]
                current = latest.get(key)
                if current is not None and current[0] == used:
                    self._reached[kind][bucket + 1] += 1.0
                    if bucket == last:
                        del latest[key]
                at += 1
            self._passed[bucket] = at + self._dropped
        while self._dropped < self._passed[last]:
            log.popleft()
            self._dropped += 1

    def refresh(self, now: int) -> list[list[float]]:
        """The index by class and bucket, hits per use of any block, from what was seen; older counts weigh less.

        A hazard is the class's level times the shape over ages of all classes together; a class's level leans on that
        of its group.
        """
        buckets = range(self.num_buckets)
        shape = [
            (sum(hits[b] for hits in self._hits) + _SHAPE_WEIGHT * self._prior[b])
            / (sum(reached[b] for reached in self._reached) + _SHAPE_WEIGHT)
            for b in buckets
        ]
        expected = [sum(reached[b] * shape[b] for b in buckets) for reached in self._reached]
        observed = [sum(hits) for hits in self._hits]
        table = []
        for kind, group in enumerate(self._groups):
            peers = [each for each, other in enumerate(self._groups) if other == group]
            level = (sum(observed[each] for each in peers) + _GROUP_WEIGHT * self._levels[kind]) / (
                sum(expected[each] for each in peers) + _GROUP_WEIGHT
            )
            level = (observed[kind] + _LEVEL_WEIGHT * level) / (expected[kind] + _LEVEL_WEIGHT)
            hazards = [min(1.0, level * each) for each in shape]
            table.append(self._index(hazards))
        decay = 0.5 ** ((now - self._decayed_at) / self._half_life_uses)
        self._decayed_at = now
        for rows in (self._hits, self._reached):
            for row in rows:
                row[:] = [each * decay for each in row]
        return table

    def _index(self, hazards: list[float]) -> list[float]:
        """For each bucket to start from: max over last buckets of expected hits / expected time."""
        found = []
        for start in range(self.num_buckets):
            alive, hits, time, best = 1.0, 0.0, 0.0, 0.0
            for bucket in range(start, self.num_buckets):
                hit = alive * hazards[bucket]
                hits += hit
                time += (alive - hit / 2) * self._widths[bucket]
                alive -= hit
                best = max(best, hits / time)
            found.append(best)
        return found
