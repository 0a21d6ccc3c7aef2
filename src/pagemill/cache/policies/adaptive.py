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
_BATCHES = 16  # in a horizon
_DEVIATIONS_TO_LEAD = 1.5
_MOST_LOST = 0.001  # of all uses


class _Shadow:
    """A cache of sampled keys that one policy rules. Mutated by `use`."""

    __slots__ = ("_free", "_keys", "_num_keys", "_policy", "_slots")

    def __init__(self, policy: Policy, capacity: int) -> None:
        self._policy = policy
        self._slots: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        self._num_keys = 0
        self._free = capacity

    def use(self, keys: Sequence[bytes], infos: Sequence[BlockInfo]) -> int:
        """Use the keys of a chain, the last one first. How many hit of those that come behind the last miss."""
        slots, at, run = self._slots, 0, 0
        while at < len(keys):
            run, end = 0, at + 1
            if keys[at] in slots:
                while end < len(keys) and keys[end] in slots:
                    end += 1
                self._policy.touch_all([slots[key] for key in keys[at:end]])
                run = end - at
            else:
                while end < len(keys) and keys[end] not in slots:
                    end += 1
                self._add(keys[at:end], infos[at:end])
            at = end
        return run

    def _add(self, keys: Sequence[bytes], infos: Sequence[BlockInfo]) -> None:
        numbers = range(self._num_keys, self._num_keys + len(keys))
        self._num_keys += len(keys)
        self._slots.update(zip(keys, numbers, strict=True))
        self._keys.update(zip(numbers, keys, strict=True))
        num_free = min(self._free, len(keys))
        for at in range(num_free):
            self._policy.on_miss(keys[at])
            self._policy.insert(numbers[at], keys[at], infos[at])
        self._free -= num_free
        if num_free < len(keys):
            for gone in self._policy.replace(numbers[num_free:], keys[num_free:], infos[num_free:]):
                del self._slots[self._keys.pop(gone)]


class Adaptive(OneByOne):
    """The order of the candidate whose shadow hits most. Mutated by every call.

    The first candidate is the one to fall back on. Of another one it is counted, over the last uses (about eight times
    the shadow's room), how many blocks more or less of each chain it hit. A chain comes last block first, so that its
    hits count from the last miss on: what lies behind a hole cannot be hit.

    It leads when that comes to one and a half times what chance would make of such differences, by those of chains and
    by those of batches of them (batch means, as of simulations whose results depend on each other): a load that is over
    before it is followed shows in a few batches. It leads until the sum is nothing, or until this cache itself, which
    holds what earlier leaders left, has hit a thousandth of all uses less than the first candidate's shadow while it
    did not follow that. A call costs what it costs in all the candidates together.
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
        self._room = room = max(1, capacity >> bits)
        self._shadows = [_Shadow(maker(room), room) for maker in self._makers]
        horizon = max(_LEAST_HORIZON, _HORIZON_PER_BLOCK * room)
        self._decision_every = max(1, horizon // _BATCHES)
        self._decay = 0.5 ** (self._decision_every / horizon)
        self._num_sampled = self._num_decided = 0
        # By candidate: blocks hit beyond the first one, in this batch and in all, and the sums of their squares.
        self._batch = [0 for _ in self._makers]
        self._gains = [0.0 for _ in self._makers]
        self._batch_squares = [0.0 for _ in self._makers]
        self._chain_squares = [0.0 for _ in self._makers]
        self._keys: list[bytes] = []  # of a chain that may go on
        self._infos: list[BlockInfo] = []
        self._depth = 0
        self._num_hits = 0  # of it, from the last miss on
        self._balance = 0  # hits of this cache beyond those of the first shadow, where it did not follow that one
        self._num_to_settle = 0  # uses until the first one's order has brought its blocks

    @property
    def leader(self) -> str:
        """Name of the candidate that is followed."""
        return self._candidates[self._leader].name

    def __contains__(self, block: int) -> bool:
        return block in self._candidates[0]

    def insert(self, block: int, key: bytes, info: BlockInfo) -> None:
        for each in self._candidates:
            each.insert(block, key, info)
        self._take_in(block, key, info)

    def touch(self, block: int) -> None:
        for each in self._candidates:
            each.touch(block)
        if block in self._blocks:
            self._sample(*self._blocks[block], hit=True)

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
                self._sample(*sampled[block], hit=True)

    def replace(self, blocks: Sequence[int], keys: Sequence[bytes], infos: Sequence[BlockInfo]) -> list[int]:
        assert not any(map(self.__contains__, blocks)), "a block is known already"
        mask, held = self._mask, self._blocks
        sampled = [at for at, key in enumerate(keys) if not key[0] & mask]
        victims: list[int] = []
        while (start := len(victims)) < len(blocks):
            # The leader may change where a chain ends.
            depth = self._depth
            end = next((at + 1 for at in sampled if at >= start and infos[at].depth >= depth), len(blocks))
            run = blocks[start:end], keys[start:end], infos[start:end]
            leader = self._candidates[self._leader]
            gone = leader.replace(*run)
            for each in self._candidates:
                if each is not leader:
                    each.exchange(gone, *run)
            for at in sampled:
                if start <= at < end:
                    self._take_in(blocks[at], keys[at], infos[at])
            for victim in gone:
                if victim in held:
                    del held[victim]
            victims += gone
        return victims

    def resize(self, capacity: int) -> None:
        """The shadows begin anew where the capacity has changed much."""
        assert capacity > 0
        for each in self._candidates:
            each.resize(capacity)
        if not 0.8 < capacity / self._capacity < 1.25:
            self._begin(capacity)
            self._blocks = {block: each for block, each in self._blocks.items() if not each[0][0] & self._mask}

    def _take_in(self, block: int, key: bytes, info: BlockInfo) -> None:
        if not key[0] & self._mask:
            self._blocks[block] = (key, info)
            self._sample(key, info, hit=False)

    def _sample(self, key: bytes, info: BlockInfo, *, hit: bool) -> None:
        if info.depth >= self._depth:
            self._end_chain()
        self._depth = info.depth
        self._keys.append(key)
        self._infos.append(info)
        self._num_hits = self._num_hits + 1 if hit else 0

    def _end_chain(self) -> None:
        """What each candidate would have hit of a chain beyond the first one, and what was hit."""
        num_keys = len(self._keys)
        hits = [shadow.use(self._keys, self._infos) for shadow in self._shadows]
        for at, each in enumerate(hits):
            self._batch[at] += each - hits[0]
            self._chain_squares[at] += (each - hits[0]) ** 2
        if self._leader:
            self._num_to_settle = self._room
        if self._num_to_settle > 0:
            self._balance += self._num_hits - hits[0]
            self._num_to_settle -= num_keys
        self._keys.clear()
        self._infos.clear()
        self._num_hits = 0
        self._num_sampled += num_keys
        if self._num_sampled - self._num_decided >= self._decision_every:
            self._num_decided = self._num_sampled
            self._decide()

    def _decide(self) -> None:
        gains = self._gains
        for at, each in enumerate(self._batch):
            gains[at] = gains[at] * self._decay + each
            self._batch_squares[at] = self._batch_squares[at] * self._decay + each * each
            self._chain_squares[at] *= self._decay
            self._batch[at] = 0
        allowed = _MOST_LOST * self._num_sampled
        if gains[self._leader] <= 0 or self._balance < -allowed:
            self._leader = 0
        best = max(range(len(gains)), key=gains.__getitem__)
        deviation = sqrt(max(self._batch_squares[best], self._chain_squares[best]))
        if gains[best] - gains[self._leader] > _DEVIATIONS_TO_LEAD * deviation and self._balance >= -allowed / 2:
            self._leader = best
