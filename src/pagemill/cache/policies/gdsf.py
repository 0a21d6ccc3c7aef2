"""GreedyDual-Size-Frequency with ghosts: uses x recompute cost / bytes, above a floor that rises with evictions.

Owns its order. Source: Cherkasova, "Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching", HP Labs
1998. The ghosts (keys of evicted blocks, twice the capacity) keep the uses, so that a block that comes back too late
has not lost its count. The cost of a block is that of its positions in prefill: it grows with what lies before them
(`recompute_cost` in cache/eviction.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from pagemill.cache.policies.base import BlockInfo, OneByOne
from pagemill.cache.policies.order import Ghosts, RankedLanes

_GHOSTS_PER_BLOCK = 2


class GDSF(OneByOne):
    """Blocks by rank = floor at the last use + uses x worth. Mutated by every call. A call costs O(log of different
    ranks): a worth that has few values, as `BlockInfo` of one page size has, makes few of them."""

    name = "gdsf"

    def __init__(self, capacity: int) -> None:
        assert capacity > 0
        self._entries: dict[int, tuple[float, int, float, bytes]] = {}  # rank, uses, worth of a use, key
        self._order = RankedLanes()
        self._ghosts: Ghosts[int] = Ghosts(_GHOSTS_PER_BLOCK * capacity)
        self._locked: set[int] = set()
        self._floor = 0.0
        self._unit_bytes = 0  # of the first page: pages of one size make few different ranks

    def __contains__(self, block: int) -> bool:
        return block in self._entries

    def insert(self, block: int, key: bytes, info: BlockInfo) -> None:
        assert block not in self._entries, f"block {block} is known already"
        assert info.num_bytes > 0, "a page has bytes"
        uses = (self._ghosts.take(key) or 0) + 1
        worth = self._worth(info)
        rank = self._floor + uses * worth
        self._entries[block] = (rank, uses, worth, key)
        self._order.put(block, rank)

    def _worth(self, info: BlockInfo) -> float:
        """Of a use: cost by bytes of the first page."""
        if not self._unit_bytes:
            self._unit_bytes = info.num_bytes
        return info.recompute_cost * self._unit_bytes / info.num_bytes

    def touch(self, block: int) -> None:
        assert block in self._entries, f"block {block} is not known"
        rank, uses, worth, key = self._entries[block]
        self._order.discard(block, rank)
        rank = self._floor + (uses + 1) * worth
        self._entries[block] = (rank, uses + 1, worth, key)
        self._order.put(block, rank)

    def lock(self, block: int) -> None:
        assert block in self._entries, f"block {block} is not known"
        assert block not in self._locked, f"block {block} is locked already"
        self._locked.add(block)

    def unlock(self, block: int) -> None:
        assert block in self._locked, f"block {block} is not locked"
        self._locked.remove(block)
        self._order.unlocked(block, self._locked)

    def victim(self) -> int | None:
        return self._order.first(self._locked)

    def remove(self, block: int, evicted: bool) -> None:
        assert block in self._entries, f"block {block} is not known"
        rank, uses, _, key = self._entries.pop(block)
        self._order.discard(block, rank)
        self._locked.discard(block)
        if evicted:
            self._floor = max(self._floor, rank)
            self._ghosts.put(key, uses)

    def on_miss(self, key: bytes) -> None:
        pass

    def replace(self, blocks: Sequence[int], keys: Sequence[bytes], infos: Sequence[BlockInfo]) -> list[int]:
        entries, order, victims = self._entries, self._order, []
        if self._locked or not order.is_plain or not entries:
            return super().replace(blocks, keys, infos)
        assert entries.keys().isdisjoint(blocks), "a block is known already"
        ranks, floor = order.ranks, self._floor
        ghosts, limit = self._ghosts.keys, self._ghosts.limit
        unit = self._unit_bytes = self._unit_bytes or next((each.num_bytes for each in infos), 0)
        stamp = order.reserve(len(blocks)) - 1
        first, into, latest = order.lowest(), None, 0.0  # the lowest lane; that of `latest`
        for block, key, info in zip(blocks, keys, infos, strict=True):
            if not first:
                first, into = order.lowest(), None
            victim, _ = first.popitem(last=False)
            rank, uses, _, gone = entries.pop(victim)
            if rank > floor:
                floor = rank
            ghosts[gone] = uses
            if len(ghosts) > limit:
                ghosts.popitem(last=False)
            victims.append(victim)
            uses = ghosts.pop(key) + 1 if key in ghosts else 1
            worth = info.recompute_cost * unit / info.num_bytes
            rank = floor + uses * worth
            entries[block] = (rank, uses, worth, key)
            stamp += 1
            if into is None or rank != latest:
                into, latest = order.lane(rank), rank
                if ranks[0] == rank:
                    first = into
            into[block] = stamp
        self._floor = floor
        return victims

    def resize(self, capacity: int) -> None:
        assert capacity > 0
        self._ghosts.resize(_GHOSTS_PER_BLOCK * capacity)
