"""Least recently used. Owns its order: the block whose last hit is longest ago leaves first."""

from __future__ import annotations

from collections.abc import Sequence

from pagemill.cache.policies.base import BlockInfo, OneByOne
from pagemill.cache.policies.order import Lane


class LRU(OneByOne):
    """Blocks in order of their last use. Mutated by every call. Every call costs O(1) a block, and O(log n) where it is
    set aside."""

    name = "lru"

    def __init__(self, capacity: int) -> None:
        assert capacity > 0
        self._lane = Lane()
        self._locked: set[int] = set()

    def __contains__(self, block: int) -> bool:
        return block in self._lane

    def insert(self, block: int, key: bytes, info: BlockInfo) -> None:
        assert block not in self._lane, f"block {block} is known already"
        self._lane.order[block] = None

    def touch(self, block: int) -> None:
        assert block in self._lane, f"block {block} is not known"
        self._lane.put(block)

    def lock(self, block: int) -> None:
        assert block in self._lane, f"block {block} is not known"
        assert block not in self._locked, f"block {block} is locked already"
        self._locked.add(block)

    def unlock(self, block: int) -> None:
        assert block in self._locked, f"block {block} is not locked"
        self._locked.remove(block)
        self._lane.unlocked(block, self._locked)

    def victim(self) -> int | None:
        return self._lane.first(self._locked)

    def remove(self, block: int, evicted: bool) -> None:
        assert block in self._lane, f"block {block} is not known"
        self._lane.discard(block)
        self._locked.discard(block)

    def on_miss(self, key: bytes) -> None:
        pass

    def touch_all(self, blocks: Sequence[int]) -> None:
        order = self._lane.order
        if not all(map(order.__contains__, blocks)):
            super().touch_all(blocks)
            return
        to_end = order.move_to_end
        for block in blocks:
            to_end(block)

    def replace(self, blocks: Sequence[int], keys: Sequence[bytes], infos: Sequence[BlockInfo]) -> list[int]:
        lane = self._lane
        if self._locked or not lane.is_plain or not lane.order:
            return super().replace(blocks, keys, infos)
        order = lane.order
        assert order.keys().isdisjoint(blocks), "a block is known already"
        drop = order.popitem
        victims = []
        for block in blocks:
            victims.append(drop(last=False)[0])
            order[block] = None
        return victims

    def exchange(
        self, victims: Sequence[int], blocks: Sequence[int], keys: Sequence[bytes], infos: Sequence[BlockInfo]
    ) -> None:
        order = self._lane.order
        if self._locked or not self._lane.is_plain:
            super().exchange(victims, blocks, keys, infos)
            return
        assert order.keys().isdisjoint(blocks), "a block is known already"
        assert len(victims) == len(blocks), "a victim for each block"
        assert order.keys() >= set(victims).difference(blocks), "a victim is not known"
        order.update(dict.fromkeys(blocks))
        for victim in victims:
            del order[victim]

    def admit(self, blocks: Sequence[int], keys: Sequence[bytes], infos: Sequence[BlockInfo]) -> None:
        lane = self._lane
        assert lane.order.keys().isdisjoint(blocks), "a block is known already"
        assert lane.is_plain or not any(map(lane.__contains__, blocks)), "a block is known already"
        order = lane.order
        for block in reversed(blocks):
            order[block] = None
        self._locked.update(blocks)

    def evict_run(self, blocks: Sequence[int]) -> int:
        count = 0 if blocks[0] in self._locked else self._lane.take_first(blocks)
        self._locked.difference_update(blocks[1:count])
        if count == len(blocks):
            return count
        if count:
            self.unlock(blocks[count])
            if self.victim() != blocks[count]:
                return count
        return count + super().evict_run(blocks[count:])

    def resize(self, capacity: int) -> None:
        assert capacity > 0
