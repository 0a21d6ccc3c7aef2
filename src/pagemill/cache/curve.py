"""Expected hit ratio against memory, for the traffic seen. Owns sampled reuse distances; decides nothing.

A cache of n blocks that evicts the least recently used hits exactly the uses whose reuse distance (different blocks
used since the last use of the same) is below n (Mattson et al., IBM Systems Journal 9, 1970). Distances are taken on a
sample of the keys and scaled up (SHARDS: Waldspurger et al., FAST 2015): a key is in the sample if its hash is below a
threshold, which falls so that never more than a fixed number of keys is followed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import accumulate
from zlib import crc32

from pagemill.base.errors import ConfigError

_HASHES = 1 << 32
_STEPS_PER_DOUBLING = 16
_OCTAVES = 48


class ReuseCurve:
    """Histogram of reuse distances of a sample. Mutated by `record`; memory is bounded by `max_keys`.

    max_keys: keys followed at the most. `record` costs O(log max_keys) for keys in the sample and a hash for others.
    """

    def __init__(self, max_keys: int = 8192) -> None:
        if max_keys < 1:
            raise ConfigError(f"a curve of {max_keys} sampled keys sees nothing; give at least 1, such as 8192")
        self._max_keys = max_keys
        self._threshold = _HASHES
        self._slots: dict[bytes, int] = {}
        self._by_hash: list[tuple[int, bytes]] = []
        # Fenwick tree over the order of last uses: 1 where a slot is some key's latest use.
        self._size = 4 * max_keys
        self._tree = [0] * (self._size + 1)
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
        return len(self._slots)

    @property
    def sampled_share(self) -> float:
        """The share of all keys that is followed."""
        return self._threshold / _HASHES

    def record(self, key: bytes) -> None:
        """A block is used: found or inserted."""
        self._num_recorded += 1
        hashed = crc32(key)
        if hashed >= self._threshold:
            return
        scale = _HASHES / self._threshold
        self._num_sampled += scale
        slot = self._slots.pop(key, None)
        if slot is None:
            heappush(self._by_hash, (-hashed, key))
        else:
            distance = len(self._slots) + 1 - self._prefix(slot)
            self._add(slot, -1)
            self._reuses[bisect_right(self._bounds, distance * scale)] += scale
        if self._next == self._size:
            self._compact()
        self._slots[key] = self._next
        self._add(self._next, 1)
        self._next += 1
        if len(self._slots) > self._max_keys:
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
        """Reuses at a distance of at most `size`, a bin that it cuts by proportion."""
        at = bisect_right(self._bounds, size)
        low = self._bounds[at - 1] if at else 0.0
        high = self._bounds[at] if at < len(self._bounds) else low
        share = (size - low) / (high - low) if high > low else 1.0
        return below[at] + (below[at + 1] - below[at]) * share

    def _add(self, slot: int, value: int) -> None:
        tree, size = self._tree, self._size
        slot += 1
        while slot <= size:
            tree[slot] += value
            slot += slot & -slot

    def _prefix(self, slot: int) -> int:
        """How many keys were last used at `slot` or before."""
        tree, total = self._tree, 0
        slot += 1
        while slot:
            total += tree[slot]
            slot &= slot - 1
        return total

    def _shrink(self) -> None:
        """Lower the threshold below the largest hash followed, and forget the keys that are out."""
        self._threshold = -self._by_hash[0][0]
        while self._by_hash and -self._by_hash[0][0] >= self._threshold:
            _, key = heappop(self._by_hash)
            self._add(self._slots.pop(key), -1)

    def _compact(self) -> None:
        """Number the slots anew from 0, in the order of last uses."""
        self._slots = {key: at for at, key in enumerate(sorted(self._slots, key=self._slots.__getitem__))}
        self._next = len(self._slots)
        self._tree = [0] * (self._size + 1)
        for slot in range(self._next):
            self._add(slot, 1)
