"""Adaptive: follows the policy that would have hit most lately, by sampled shadow caches. Owns the choice of policy.

Every candidate keeps an order of the blocks that are really there, so that following another one takes effect at once.
Which one to follow is told by shadows: for each candidate a small cache of keys alone, with the sampled share of the
keys and the same share of the room (as in Waldspurger et al., "Cache modeling and optimization using miniature
simulations", ATC 2017).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from zlib import crc32

from pagemill.cache.policies.base import BlockInfo, Policy
from pagemill.cache.policies.gdsf import GDSF
from pagemill.cache.policies.gittins import Gittins
from pagemill.cache.policies.lru import LRU

_SHADOW_BLOCKS = 4096
_HORIZON_PER_BLOCK = 4
_LEAST_HORIZON = 2000
_LEAD = 0.03
_LEAD_DEVIATIONS = 3.0


class _Shadow:
    """A cache of sampled keys that one policy rules. Mutated by `use`. hits: lately, older ones weigh less.

    A chain comes last block first, so that its hits count when its beginning has come and from the last miss on: what
    lies behind a hole cannot be hit. Blocks that come in another order count each for itself.
    """

    __slots__ = ("_depth", "_free", "_keys", "_policy", "_run", "_slots", "hits")

    def __init__(self, policy: Policy, capacity: int) -> None:
        self._policy = policy
        self._slots: dict[bytes, int] = {}
        self._keys: list[bytes] = []
        self._free = capacity
        self._depth = 0
        self._run = 0
        self.hits = 0.0

    def use(self, key: bytes, info: BlockInfo) -> None:
        if info.depth >= self._depth:
            self.hits += self._run
            self._run = 0
        self._depth = info.depth
        slot = self._slots.get(key)
        if slot is not None:
            self._run += 1
            self._policy.touch(slot)
            return
        self._run = 0
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


class Adaptive:
    """The order of the candidate whose shadow hits most. Mutated by every call.

    The first candidate is the one to fall back on: another leads when it hits clearly more over the last uses (about
    four times the shadow's room), and no longer than it hits more at all. A call costs what it costs in all the
    candidates together.
    """

    name = "adaptive"

    def __init__(self, capacity: int, makers: Sequence[Callable[[int], Policy]] = (LRU, GDSF, Gittins)) -> None:
        assert capacity > 0
        self._modulus = max(1, capacity // _SHADOW_BLOCKS)
        room = max(1, capacity // self._modulus)
        self._candidates = [maker(capacity) for maker in makers]
        self._shadows = [_Shadow(maker(room), room) for maker in makers]
        self._leader = 0
        self._blocks: dict[int, tuple[bytes, BlockInfo]] = {}
        self._horizon = max(_LEAST_HORIZON, _HORIZON_PER_BLOCK * room)
        self._decision_every = max(1, self._horizon // 16)
        self._decay = 0.5 ** (self._decision_every / self._horizon)
        self._num_sampled = 0

    @property
    def leader(self) -> str:
        """Name of the candidate that is followed."""
        return self._candidates[self._leader].name

    def insert(self, block: int, key: bytes, info: BlockInfo) -> None:
        assert block not in self._blocks, f"block {block} is known already"
        self._blocks[block] = (key, info)
        for each in self._candidates:
            each.insert(block, key, info)
        self._sample(key, info)

    def touch(self, block: int) -> None:
        assert block in self._blocks, f"block {block} is not known"
        for each in self._candidates:
            each.touch(block)
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
        assert block in self._blocks, f"block {block} is not known"
        del self._blocks[block]
        for each in self._candidates:
            each.remove(block, evicted)

    def on_miss(self, key: bytes) -> None:
        for each in self._candidates:
            each.on_miss(key)

    def _sample(self, key: bytes, info: BlockInfo) -> None:
        if self._modulus > 1 and crc32(key) % self._modulus:
            return
        for shadow in self._shadows:
            shadow.use(key, info)
        self._num_sampled += 1
        if self._num_sampled % self._decision_every == 0:
            self._decide()

    def _decide(self) -> None:
        hits = [each.hits for each in self._shadows]
        if hits[self._leader] <= hits[0]:
            self._leader = 0
        best = max(range(len(hits)), key=lambda each: hits[each])
        current = hits[self._leader]
        if hits[best] > current * (1 + _LEAD) + _LEAD_DEVIATIONS * sqrt(current):
            self._leader = best
        for shadow in self._shadows:
            shadow.hits *= self._decay
