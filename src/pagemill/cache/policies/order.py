"""Queues and heaps that policies are made of, which skip nothing: what is locked is not in them.

Owns putting a block back where it stood. What a place means (last use, frequency, worth) is each policy's own.
"""

from __future__ import annotations

from collections import OrderedDict
from heapq import heapify, heappop, heappush, heapreplace
from typing import Generic, TypeVar

_SLACK = 64
T = TypeVar("T")


class StampedQueue:
    """Blocks in ascending order of a stamp (a count that only grows). Mutated by `put` and `discard`.

    A block with the newest stamp goes to the end of an ordered dictionary, O(1). A block that comes back to an earlier
    place waits in a heap beside it, O(log n). No two blocks have one stamp.
    """

    __slots__ = ("_heap", "_order", "_returned")

    def __init__(self) -> None:
        self._order: OrderedDict[int, int] = OrderedDict()
        self._returned: dict[int, int] = {}
        self._heap: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._order) + len(self._returned)

    def __contains__(self, block: int) -> bool:
        return block in self._order or block in self._returned

    def put(self, block: int, stamp: int) -> None:
        """Add a block, or move it to a newer stamp."""
        order = self._order
        if self._returned:
            self._returned.pop(block, None)
        if not order or order[next(reversed(order))] < stamp:
            order[block] = stamp
            order.move_to_end(block)
            return
        order.pop(block, None)
        self._returned[block] = stamp
        heappush(self._heap, (stamp, block))
        if len(self._heap) > 2 * len(self._returned) + _SLACK:
            self._heap = [(at, each) for each, at in self._returned.items()]
            heapify(self._heap)

    def discard(self, block: int) -> None:
        """Take a block out, if it is there."""
        if self._order.pop(block, None) is None:
            self._returned.pop(block, None)

    def first(self) -> tuple[int, int] | None:
        """(stamp, block) of the earliest block; None where the queue is empty."""
        order = self._order
        ahead: tuple[int, int] | None = None
        if order:
            block = next(iter(order))
            ahead = (order[block], block)
        if self._returned:
            while self._returned.get(self._heap[0][1]) != self._heap[0][0]:
                heappop(self._heap)
            if ahead is None or self._heap[0] < ahead:
                return self._heap[0]
        return ahead


class RankedHeap:
    """Blocks by a rank (value, stamp) that only grows while a block is in. Mutated by every call, `first` included.

    A rank that grows is put right when its block comes to the top, so that a hit costs O(1) and a victim O(log n),
    amortised over the hits.
    """

    __slots__ = ("_heap", "_listed", "_ranks")

    def __init__(self) -> None:
        self._ranks: dict[int, tuple[float, int]] = {}
        self._listed: dict[int, tuple[float, int]] = {}
        self._heap: list[tuple[tuple[float, int], int]] = []

    def __len__(self) -> int:
        return len(self._ranks)

    def put(self, block: int, value: float, stamp: int) -> None:
        """Add a block, or raise its rank."""
        rank = (value, stamp)
        self._ranks[block] = rank
        listed = self._listed.get(block)
        if listed is None or rank < listed:
            self._listed[block] = rank
            heappush(self._heap, (rank, block))
            if len(self._heap) > 2 * len(self._listed) + _SLACK:
                self._heap = [(at, each) for each, at in self._listed.items()]
                heapify(self._heap)

    def discard(self, block: int) -> None:
        """Take a block out, if it is there. Its entry is dropped when it comes to the top."""
        self._ranks.pop(block, None)

    def first(self) -> int | None:
        """The block with the lowest rank; None where there is none."""
        heap, ranks, listed = self._heap, self._ranks, self._listed
        while heap:
            at, block = heap[0]
            if listed.get(block) != at:
                heappop(heap)
                continue
            rank = ranks.get(block)
            if rank == at:
                return block
            if rank is None:
                heappop(heap)
                del listed[block]
            else:
                listed[block] = rank
                heapreplace(heap, (rank, block))
        return None


class Ghosts(Generic[T]):
    """Keys of blocks that were evicted, with what is remembered of each: the last `limit` of them.

    Mutated by `put`, `take` and `drop_oldest`, O(1) each.
    """

    __slots__ = ("_keys", "_limit")

    def __init__(self, limit: int) -> None:
        self._keys: OrderedDict[bytes, T] = OrderedDict()
        self._limit = limit

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: bytes) -> bool:
        return key in self._keys

    def put(self, key: bytes, memory: T) -> None:
        """Remember a key as the latest; the oldest beyond the limit is forgotten."""
        self._keys[key] = memory
        self._keys.move_to_end(key)
        if len(self._keys) > self._limit:
            self._keys.popitem(last=False)

    def take(self, key: bytes) -> T | None:
        """Forget a key; what was remembered of it, or None where it is not here."""
        return self._keys.pop(key, None)

    def drop_oldest(self) -> None:
        """Forget the key that was evicted first, if there is one."""
        if self._keys:
            self._keys.popitem(last=False)
