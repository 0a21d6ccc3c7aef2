"""How soon blocks of a class are used again, learned from the stream of uses. Owns the estimate and its index.

For each class of blocks, ages (uses of any block since a block's last one) fall into buckets that widen. The learner
counts how many blocks of a class reached a bucket and how many were used again in it, evicted or not, which gives a
hazard for each bucket (Kaplan and Meier, 1958). The index of a class and an age is the best ratio, over all
times to stop, of hits expected by then to the time held (Gittins, 1979): what a place in the cache earns with it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import mul

EPOCHS_PER_CAPACITY = 16
_SAMPLED = 4096
_LEAST_EPOCH = 8
_MOST_SAMPLED_BITS = 8


@dataclass(frozen=True, slots=True)
class LearnerSetting:
    """Constants of the estimate; scripts/tune_gittins.py chose them.

    first_edge: end of the first bucket of age, in capacities; each of num_edges is sqrt 2 times the one before.
    half_life: after so many capacities of uses a count weighs half. shape_weight, level_weight, group_weight: blocks
    that the expectation before anything was seen weighs as much as, for the shape over ages of all classes, for the
    level of a class and for that of its group. prior_hazard, prior_age: that expectation is a reuse that thins out with
    age, prior_hazard x width / (age + prior_age capacities), in the proportion of a heavy tail.
    """

    first_edge: float = 0.5
    num_edges: int = 9
    half_life: float = 24.0
    shape_weight: float = 5000.0
    level_weight: float = 6400.0
    group_weight: float = 640.0
    prior_hazard: float = 0.1
    prior_age: float = 0.5


class ReuseLearner:
    """Counts of reuse by class and age. Mutated by `record`, `advance`, `refresh` and `take_over`.

    epoch: the one that has begun; keys, kinds: uses in it that are yet to be counted, to which policies may append what
    `record` would.

    capacity: blocks of the cache, the unit of ages. levels: for each class, how often its blocks are expected to be
    used again relative to the others, before anything is seen. groups: for each, the group whose level it leans on.
    Time is counted in epochs, a 16th of the capacity in uses but 8 at the least. Memory is bounded: of a large cache a
    sample of the keys is followed (those whose first byte has none of the bits of `mask`), up to the last edge back.
    """

    def __init__(
        self, capacity: int, levels: Sequence[float], groups: Sequence[int], setting: LearnerSetting | None = None
    ) -> None:
        self._setting = setting or LearnerSetting()
        self.epoch_uses = max(_LEAST_EPOCH, capacity // EPOCHS_PER_CAPACITY)
        edges: list[int] = []
        for step in range(self._setting.num_edges):
            edge = int(EPOCHS_PER_CAPACITY * self._setting.first_edge * 2 ** (step / 2))
            edges.append(max(edge, edges[-1] + 1 if edges else 1))
        self.edges = tuple(edges)  # in epochs
        self.num_buckets = len(edges) + 1
        self._widths = [
            each * self.epoch_uses for each in (edges[0], *(b - a for a, b in pairwise(edges)), edges[-1])
        ]  # fmt: skip
        self._levels = tuple(levels)
        self._groups = tuple(groups)
        self.mask = (1 << min(_MOST_SAMPLED_BITS, (max(1, capacity // _SAMPLED)).bit_length() - 1)) - 1
        self.epoch = 0
        self.keys: list[bytes] = []  # used in this epoch and not yet counted, with their classes
        self.kinds: list[int] = []
        self._latest: dict[bytes, tuple[int, int]] = {}
        self._keys: dict[int, list[bytes]] = {}  # used in an epoch
        self._alive: dict[int, list[int]] = {}  # by class: blocks used in an epoch and not since
        self._hits = [[0.0] * self.num_buckets for _ in self._levels]
        self._reached = [[0.0] * self.num_buckets for _ in self._levels]
        prior_age = self._setting.prior_age * EPOCHS_PER_CAPACITY
        bounds = (*edges, 2 * edges[-1])
        self._prior = [
            min(0.5, self._setting.prior_hazard * width / self.epoch_uses / (bound + prior_age))
            for width, bound in zip(self._widths, bounds, strict=True)
        ]
        self._decay = 0.5 ** (1 / (self._setting.half_life * EPOCHS_PER_CAPACITY))
        self._decayed_at = 0

    def bucket(self, age: int) -> int:
        """The bucket of an age in epochs."""
        return bisect_right(self.edges, age)

    def record(self, key: bytes, epoch: int, kind: int) -> None:
        """A block of class `kind` is used, in an epoch that is never before those recorded. Its key is in the
        sample: `not key[0] & mask`."""
        if epoch != self.epoch:
            self._count()
            self.epoch = epoch
        self.keys.append(key)
        self.kinds.append(kind)

    def _count(self) -> None:
        """Count the uses of `keys`."""
        if not self.keys:
            return
        latest, epoch, num_kinds = self._latest, self.epoch, len(self._levels)
        reached = [row[0] for row in self._reached]
        alive = self._alive.setdefault(epoch, [0] * num_kinds)
        marks = [(epoch, kind) for kind in range(num_kinds)]
        for key, kind in zip(self.keys, self.kinds, strict=True):
            if key in latest:
                at, was = latest[key]
                self._hits[was][bisect_right(self.edges, epoch - at)] += 1.0
                self._alive[at][was] -= 1
            latest[key] = marks[kind]
            reached[kind] += 1.0
            alive[kind] += 1
        for row, count in zip(self._reached, reached, strict=True):
            row[0] = count
        self._keys.setdefault(epoch, []).extend(self.keys)
        self.keys.clear()
        self.kinds.clear()

    def advance(self, epoch: int) -> None:
        """An epoch begins: blocks have grown older, some have reached the next bucket. Called for each."""
        self._count()
        self.epoch = epoch
        for bucket, edge in enumerate(self.edges):
            alive = self._alive.get(epoch - edge)
            if alive is not None:
                for kind, count in enumerate(alive):
                    if count:
                        self._reached[kind][bucket + 1] += count
        at = epoch - self.edges[-1]
        if at in self._alive:
            del self._alive[at]
            latest = self._latest
            for key in self._keys.pop(at):
                if key in latest and latest[key][0] == at:
                    del latest[key]

    def refresh(self, epoch: int) -> list[list[float]]:
        """The index by class and bucket, hits per use of any block, from what was seen; older counts weigh less.

        A hazard is the class's level times the shape over ages of all classes together; a class's level leans on that
        of its group.
        """
        self._count()
        setting = self._setting
        shape, observed, expected = self._seen()
        by_group: dict[int, tuple[float, float]] = {}
        for group, one, other in zip(self._groups, observed, expected, strict=True):
            seen, wanted = by_group.get(group, (0, 0))
            by_group[group] = (seen + one, wanted + other)
        table = []
        for kind, group in enumerate(self._groups):
            seen, wanted = by_group[group]
            level = (seen + setting.group_weight * self._levels[kind]) / (wanted + setting.group_weight)
            level = (observed[kind] + setting.level_weight * level) / (expected[kind] + setting.level_weight)
            table.append(self._index([min(1.0, level * each) for each in shape]))
        decay = self._decay ** (epoch - self._decayed_at)
        self._decayed_at = epoch
        for rows in (self._hits, self._reached):
            for row in rows:
                row[:] = [each * decay for each in row]
        return table

    def _seen(self) -> tuple[list[float], list[float], list[float]]:
        """The hazard of each bucket of age, all classes together; by class the reuses seen, and those that this shape
        would give."""
        weight = self._setting.shape_weight
        hits = map(sum, zip(*self._hits, strict=True))
        reached = map(sum, zip(*self._reached, strict=True))
        shape = [
            (one + weight * prior) / (all_ + weight)
            for one, all_, prior in zip(hits, reached, self._prior, strict=True)
        ]
        expected = [sum(map(mul, row, shape)) for row in self._reached]
        return shape, [sum(row) for row in self._hits], expected

    def take_over(self, other: ReuseLearner, epoch: int) -> None:
        """Begin with another learner's counts, of the same classes: ages in capacities tell much at any capacity."""
        other._count()
        self._hits = [list(row) for row in other._hits]
        self._reached = [list(row) for row in other._reached]
        self._decayed_at = epoch

    def _index(self, hazards: list[float]) -> list[float]:
        """For each bucket to start from: max over last buckets of expected hits / expected time."""
        found = []
        pairs = list(zip(hazards, self._widths, strict=True))
        for start in range(self.num_buckets):
            alive, hits, time, best = 1.0, 0.0, 0.0, 0.0
            for hazard, width in pairs[start:]:
                hit = alive * hazard
                hits += hit
                time += (alive - hit / 2) * width
                alive -= hit
                if hits > best * time:
                    best = hits / time
            found.append(best)
        return found
