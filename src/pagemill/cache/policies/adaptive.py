"""Adaptive: follows the policy that would have hit most lately, by sampled shadow caches. Owns the choice of policy.

Every candidate keeps an order of the blocks that are really there, so that following another one takes effect at once.
Which one to follow is told by shadows: for each candidate a small cache of keys alone, with the sampled share of the
keys and the same share of the room (as in Waldspurger et al., "Cache modeling and optimization using miniature
simulations", ATC 2017).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt

from pagemill.cache.policies.base import BlockInfo, OneByOne, Policy
from pagemill.cache.policies.gittins import Gittins
from pagemill.cache.policies.lru import LRU

_SHADOW_BLOCKS = 1024
_MOST_SAMPLED_BITS = 8
_HORIZON_PER_BLOCK = 8
_LEAST_HORIZON = 2000
_DEVIATIONS_TO_LEAD = 2.0
_DEVIATIONS_TO_STAY = 0.0


class _Shadow:
    """A cache of sampled keys that one policy rules. Mutated by `use`."""

    __slots__ = ("_free", "_keys", "_policy", "_slots")

    def __init__(self, policy: Policy, capacity: int) -> None:
        self._policy = policy
        self._slots: dict[bytes, int] = {}
        self._keys: list[bytes] = []
        self._free = capacity

    def use(self, key: bytes, info: BlockInfo) -> bool:
        """True where it hits."""
        slot = self._slots.get(key)
        if slot is not None:
            self._policy.touch(slot)
            return True
        self._policy.on_miss(key)
        if self._free:
            self._free -= 1
            slot = len(self._keys)
            self._keys.append(key)
        else:
            slot = self._policy.victim()
            assert slot is not None, "nothing is locked in a shadow"
            self._policy.remove(slot, True)
            del self._slots[self._keys[slot]]
            self._keys[slot] = key
        self._slots[key] = slot
        self._policy.insert(slot, key, info)
        return False


class Adaptive(OneByOne):
    """The order of the candidate whose shadow hits most. Mutated by every call.

    The first candidate is the one to fall back on. Of another one it is counted, over the last uses (about eight times
    the shadow's room), how many blocks more or less of each chain it hit. It leads when that comes to twice what chance
    would make of such differences, and no longer than to more than nothing. A chain comes last block first, so that its
    hits count from the last miss on: what lies behind a hole cannot be hit. A call costs what it costs in all the
    candidates together.
    """

    name = "adaptive"

    def __init__(self, capacity: int, makers: Sequence[Callable[[int], Policy]] = (LRU, Gittins)) -> None:
        assert capacity > 0
        self._makers = tuple(makers)
        self._candidates = [maker(capacity) for maker in makers]
        self._leader = 0
        self._blocks: dict[int, tuple[bytes, BlockInfo]] = {}  # of the sample alone
        self._begin(capacity)

    def _begin(self, capacity: int) -> None:
        """Shadows for a capacity."""
        self._capacity = capacity
        bits = min(_MOST_SAMPLED_BITS, max(1, capacity // _SHADOW_BLOCKS).bit_length() - 1)
        self._mask = (1 << bits) - 1
        room = max(1, capacity >> bits)
        self._shadows = [_Shadow(maker(room), room) for maker in self._makers]
        self._horizon = max(_LEAST_HORIZON, _HORIZON_PER_BLOCK * room)
        self._decision_every = max(1, self._horizon // 16)
        self._decay = 0.5 ** (self._decision_every / self._horizon)
        self._num_sampled = 0
        self._gains = [0.0 for _ in self._makers]
        self._variances = [0.0 for _ in self._makers]
        self._runs = [0 for _ in self._makers]
        self._depth = 0

    @property
    def leader(self) -> str:
        """Name of the candidate that is followed."""
        return self._candidates[self._leader].name

    def __contains__(self, block: int) -> bool:
        return block in self._candidates[0]

    def insert(self, block: int, key: bytes, info: BlockInfo) -> None:
        for each in self._candidates:
            each.insert(block, key, info)
        if not key[0] & self._mask:
            self._blocks[block] = (key, info)
            self._sample(key, info)

    def touch(self, block: int) -> None:
        for each in self._candidates:
            each.touch(block)
        if block in self._blocks:
            self._sample(*self._blocks[block])

    def lock(self, block: int) -> None:
        for each in self._candidates:
            each.lock(block)

    def unlock(self, block: int) -> None:
        for each in self._candidates:
            each.unlock(block)

    def victim(self) -> int | None:
        return self._candidates[self._leader].victim()

    def remove(self, block: int, evicted: bool) -> None:
        for each in self._candidates:
            each.remove(block, evicted)
        self._blocks.pop(block, None)

    def on_miss(self, key: bytes) -> None:
        for each in self._candidates:
            each.on_miss(key)

    def touch_all(self, blocks: Sequence[int]) -> None:
        for each in self._candidates:
            each.touch_all(blocks)
        sampled = self._blocks
        for block in blocks:
            if block in sampled:
                self._sample(*sampled[block])

    def resize(self, capacity: int) -> None:
        """The shadows begin anew where the capacity has changed much."""
        assert capacity > 0
        for each in self._candidates:
            each.resize(capacity)
        if not 0.8 < capacity / self._capacity < 1.25:
            self._begin(capacity)
            self._blocks = {block: each for block, each in self._blocks.items() if not each[0][0] & self._mask}

    def _sample(self, key: bytes, info: BlockInfo) -> None:
        if info.depth >= self._depth:
            self._count()
        self._depth = info.depth
        runs = self._runs
        for at, shadow in enumerate(self._shadows):
            runs[at] = runs[at] + 1 if shadow.use(key, info) else 0
        self._num_sampled += 1
        if self._num_sampled % self._decision_every == 0:
            self._decide()

    def _count(self) -> None:
        """A chain has ended: what each candidate hit of it beyond the first one."""
        base = self._runs[0]
        for at, run in enumerate(self._runs):
            self._gains[at] += run - base
            self._variances[at] += (run - base) ** 2
            self._runs[at] = 0

    def _decide(self) -> None:
        gains, variances = self._gains, self._variances
        if gains[self._leader] <= _DEVIATIONS_TO_STAY * sqrt(variances[self._leader]):
            self._leader = 0
        best = max(range(len(gains)), key=gains.__getitem__)
        if gains[best] - gains[self._leader] > _DEVIATIONS_TO_LEAD * sqrt(variances[best]):
            self._leader = best
        self._gains = [each * self._decay for each in gains]
        self._variances = [each * self._decay for each in variances]
