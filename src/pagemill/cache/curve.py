"""Expected hit ratio against memory, for the traffic seen. Owns sampled reuse distances; decides nothing.

A cache of n blocks that evicts the least recently used hits exactly the uses whose reuse distance (different blocks
used since the last use of the same) is below n (Mattson et al., IBM Systems Journal 9, 1970). Distances are taken on a
sample of the keys and scaled up (SHARDS: Waldspurger et al., FAST 2015): a key is in the sample if it is below a
threshold, which falls so that never more than a fixed number of keys is followed.

A text is one use of all its blocks, the last one first. So blocks are ordered by the text that used them last, and
within it from the first to the last: what is left of an older text is always its end, because texts share beginnings.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from math import ceil

from pagemill.base.errors import ConfigError

DEFAULT_KEYS = 8192

_PREFIX_BYTES = 8
_ALL = 1 << (8 * _PREFIX_BYTES)
_STEPS_PER_DOUBLING = 16
_OCTAVES = 48


class ReuseCurve:
    """Histogram of reuse distances of a sample. Mutated by `record` and `insert`; memory is bounded by `max_keys`.

    max_keys: keys followed at the most. Keys are digests, as blocks have them: their first bytes are as good as random.
    `record` costs O(log max_keys) for each text that left blocks behind, and O(1) for each of its keys.
    """

    __slots__ = (
        "_bounds", "_last_uses", "_limit", "_max_keys", "_next", "_num_recorded", "_num_sampled", "_reuses",
        "_threshold", "_tree",
    )  # fmt: skip

    def __init__(self, max_keys: int = DEFAULT_KEYS) -> None:
        if max_keys < 1:
            raise ConfigError(f"a curve of {max_keys} sampled keys sees nothing; give at least 1, such as 8192")
        self._max_keys = max_keys
        self._threshold = _ALL
        self._limit: bytes | None = None  # the threshold as keys compare with it; None lets all of them in
        self._last_uses: dict[bytes, int] = {}  # key -> number of the text that used it last
        # Fenwick tree over these numbers: how many keys each text was the last to use.
        self._tree = [0] * (4 * max_keys + 1)
        self._next = 0
        self._reuses = [0.0] * (_STEPS_PER_DOUBLING * _OCTAVES)
        self._bounds = [2 ** (step / _STEPS_PER_DOUBLING) for step in range(1, len(self._reuses))]
        self._num_sampled = 0.0
        self._num_recorded = 0

    @property
    def num_recorded(self) -> int:
        """Uses seen, in the sample or not."""
        return self._num_recorded

    @property
    def num_keys(self) -> int:
        """Keys followed now."""
        return len(self._last_uses)

    @property
    def sampled_share(self) -> float:
        """The share of all keys that is followed."""
        return self._threshold / _ALL

    def record(self, keys: Sequence[bytes]) -> None:
        """A text is looked up. keys: of its blocks from the first to the last, found or not."""
        self._num_recorded += len(keys)
        limit = self._limit
        if limit is not None:
            keys = [key for key in keys if key < limit]
        if not keys:
            return
        if self._next == len(self._tree) - 1:
            self._renumber()
        last_uses, number = self._last_uses, self._next
        scale = _ALL / self._threshold
        self._num_sampled += scale * len(keys)
        num_keys = len(last_uses)
        reuses, bounds = self._reuses, self._bounds
        before, above, rank, deepest = -1, 0, 0, 0
        place, end = 0, 0.0
        num_new = 0
        for key in keys:
            last = last_uses.get(key)
            last_uses[key] = number
            if last is None:
                num_new += 1
                continue
            if last != before:
                self._move(before, number, rank)
                before, above, rank = last, num_keys - self._num_until(last), 0
            rank += 1
            if above + rank > deepest:  # a block is found only behind all that come before it
                deepest = above + rank
                if deepest * scale >= end:
                    place = bisect_right(bounds, deepest * scale)
                    end = bounds[place] if place < len(bounds) else float("inf")
            reuses[place] += scale
        self._move(before, number, rank)
        self._add(number, num_new)
        self._next = number + 1
        if len(last_uses) > self._max_keys:
            self._shrink()

    def insert(self, key: bytes) -> None:
        """A block can be found from now on that nobody has looked for: of a generated answer."""
        if key in self._last_uses or (self._limit is not None and key >= self._limit):
            return
        if self._next == len(self._tree) - 1:
            self._renumber()
        self._last_uses[key] = self._next
        self._add(self._next, 1)
        self._next += 1
        if len(self._last_uses) > self._max_keys:
            self._shrink()

    def curve(self, sizes: Sequence[int]) -> list[float]:
        """Expected hit ratio of uses for each size in blocks (> 0), 0.0 before anything was seen. Raises ConfigError.

        Scaled sampled counts stand against all uses that were seen, so that a sample with too few or too many uses of
        popular keys is put right in the first bin (SHARDS-adj).
        """
        wrong = [size for size in sizes if size < 1]
        if wrong:
            raise ConfigError(f"a cache of {wrong[0]} blocks holds nothing; give sizes from 1")
        if not self._num_recorded:
            return [0.0 for _ in sizes]
        missing = self._num_recorded - self._num_sampled
        below = [0.0, *accumulate(self._reuses)]
        return [min(1.0, max(0.0, (self._below(below, size) + missing) / self._num_recorded)) for size in sizes]

    def _below(self, below: list[float], size: int) -> float:
        """Reuses at a distance of at most `size`; of the bin that it cuts, the share of whole distances."""
        at = bisect_right(self._bounds, size)
        low = ceil(self._bounds[at - 1]) if at else 1
        high = ceil(self._bounds[at]) if at < len(self._bounds) else low
        share = (size + 1 - low) / (high - low) if high > low else 1.0
        return below[at] + (below[at + 1] - below[at]) * min(share, 1.0)

    def _move(self, number: int, to: int, count: int) -> None:
        if count:
            self._add(number, -count)
            self._add(to, count)

    def _add(self, number: int, count: int) -> None:
        tree = self._tree
        number += 1
        while number < len(tree):
            tree[number] += count
            number += number & -number

    def _num_until(self, number: int) -> int:
        """How many keys were last used by text `number` or before."""
        tree, total = self._tree, 0
        number += 1
        while number:
            total += tree[number]
            number &= number - 1
        return total

    def _shrink(self) -> None:
        """Lower the threshold by an eighth until few enough keys are below it, and forget the others."""
        last_uses = self._last_uses
        while len(last_uses) > self._max_keys:
            self._threshold -= max(1, self._threshold // 8)
            limit = self._limit = self._threshold.to_bytes(_PREFIX_BYTES, "big")
            last_uses = {key: number for key, number in last_uses.items() if key < limit}
        self._last_uses = last_uses
        self._renumber()

    def _renumber(self) -> None:
        """Number the texts that keys remember anew from 0, in order."""
        counts = Counter(self._last_uses.values())
        numbers = {number: at for at, number in enumerate(sorted(counts))}  # in order
        self._last_uses = {key: numbers[number] for key, number in self._last_uses.items()}
        self._next = count = len(numbers)
        # A place at + 1 sums up the counts above at + 1 - its lowest bit; behind the last number only its ancestors do.
        until = [0, *accumulate(counts[number] for number in numbers)]
        tree = self._tree = [0] * len(self._tree)
        tree[1 : count + 1] = [until[at] - until[at & (at - 1)] for at in range(1, count + 1)]
        at = count + (count & -count)
        while at and at < len(tree):
            tree[at] = until[count] - until[min(at & (at - 1), count)]
            at += at & -at
