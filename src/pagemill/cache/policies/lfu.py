"""Least frequently used. Owns its order: fewest hits first, among equals the one whose last hit is longest ago.

Counts live as long as the block and do not age, so that a load that moves on is followed slowly: a reference point
rather than a choice.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from heapq import heappush

from pagemill.cache.policies.base import BlockInfo, OneByOne
from pagemill.cache.policies.order import RankedLanes


class LFU(OneByOne):
    """A lane for each number of hits. Mutated by every call. A hit costs O(log of different counts) at the most."""

    name = "lfu"

    def __init__(self, capacity: int) -> None:
        assert capacity > 0
        self._uses: dict[int, int] = {}
        self._order = RankedLanes()
        self._locked: set[int] = set()

    def __contains__(self, block: int) -> bool:
        return block in self._uses

    def insert(self, block: int, key: bytes, info: BlockInfo) -> None:
        assert block not in self._uses, f"block {block} is known already"
        self._uses[block] = 1
        self._order.put(block, 1)

    def touch(self, block: int) -> None:
        assert block in self._uses, f"block {block} is not known"
        count = self._uses[block]
        self._order.discard(block, count)
        self._uses[block] = count + 1
        self._order.put(block, count + 1)

    def lock(self, block: int) -> None:
        assert block in self._uses, f"block {block} is not known"
        assert block not in self._locked, f"block {block} is locked already"
        self._locked.add(block)

    def unlock(self, block: int) -> None:
        assert block in self._locked, f"block {block} is not locked"
        self._locked.remove(block)
        self._order.unlocked(block, self._locked)

    def victim(self) -> int | None:
        return self._order.first(self._locked)

    def remove(self, block: int, evicted: bool) -> None:
        assert block in self._uses, f"block {block} is not known"
        self._order.discard(block, self._uses.pop(block))
        self._locked.discard(block)

    def on_miss(self, key: bytes) -> None:
        pass

    def replace(self, blocks: Sequence[int], keys: Sequence[bytes], infos: Sequence[BlockInfo]) -> list[int]:
        first = self._order.first(self._locked)
        uses, lanes = self._uses, self._order.lanes
        if self._locked or not self._order.is_plain or not blocks or first is None:
            return super().replace(blocks, keys, infos)
        assert not any(map(uses.__contains__, blocks)), "a block is known already"
        # The first victim may be of any rank; then blocks used once are there, and the earliest of them leaves.
        self._order.discard(first, uses.pop(first))
        victims = [first]
        lane = lanes.get(1)
        if lane is None:
            lane = lanes[1] = OrderedDict()
            heappush(self._order.ranks, 1)
        stamp = self._order.reserve(len(blocks))
        lane[blocks[0]] = stamp
        uses[blocks[0]] = 1
        for block in blocks[1:]:
            stamp += 1
            victim, _ = lane.popitem(last=False)
            del uses[victim]
            lane[block] = stamp
            uses[block] = 1
            victims.append(victim)
        return victims

    def resize(self, capacity: int) -> None:
        assert capacity > 0
