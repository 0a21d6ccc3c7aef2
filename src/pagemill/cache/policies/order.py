"""Queues and heaps that policies are made of, in which nothing that is locked is walked past twice.

Owns setting a locked block aside when it stands first, and putting it back where it stood. What a place means (last
use, frequency, worth) is each policy's own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence, Set
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

_SLACK = 64
T = TypeVar("T")


class Lane:
    """Blocks in the order in which they were put. Mutated by every call that is not a question.

    order: the blocks; policies may append to it, move to its end and take from it as long as `is_plain`. A block that
    is locked and stands first is set aside with a number: whatever was set aside stands before all of `order`, in the
    order of these numbers.
    """

    __slots__ = ("_aside", "_back", "_count", "order")

    def __init__(self) -> None:
        self.order: OrderedDict[int, None] = OrderedDict()
        self._aside: dict[int, int] = {}
        self._back: list[tuple[int, int]] = []  # set aside and unlocked since, a heap; may name some that are not
        self._count = 0

    def __len__(self) -> int:
        return len(self.order) + len(self._aside)

    def __contains__(self, block: int) -> bool:
        return block in self.order or block in self._aside

    @property
    def is_plain(self) -> bool:
        """True where nothing is set aside, so that `order` is all there is."""
        return not self._aside

    def put(self, block: int) -> None:
        """Add a block at the end, or move it there."""
        if self._aside:
            self._aside.pop(block, None)
        self.order[block] = None
        self.order.move_to_end(block)

    def discard(self, block: int) -> bool:
        """Take a block out; False where it is not there."""
        if block in self.order:
            del self.order[block]
            return True
        return self._aside.pop(block, None) is not None

    def unlocked(self, block: int, locked: Set[int]) -> None:
        """A block may be first again."""
        at = self._aside.get(block)
        if at is None:
            return
        heappush(self._back, (at, block))
        if len(self._back) > 2 * len(self._aside) + _SLACK:
            self._back = [(at, each) for each, at in self._aside.items() if each not in locked]
            heapify(self._back)

    def first(self, locked: Set[int]) -> int | None:
        """The earliest block that is not locked; None where there is none."""
        back, aside, order = self._back, self._aside, self.order
        while back:
            at, block = back[0]
            if aside.get(block) == at and block not in locked:
                return block
            heappop(back)
        while order:
            block = next(iter(order))
            if block not in locked:
                return block
            del order[block]
            aside[block] = self._count
            self._count += 1
        return None

    def take_first(self, blocks: Sequence[int]) -> int:
        """Take blocks out as long as each stands first of `order`, with none before it that was set aside and unlocked
        since. How many did."""
        order = self.order
        take = order.popitem
        for count, block in enumerate(blocks):
            if not order or self._back:
                return count
            first, _ = take(last=False)
            if first != block:
                order[first] = None
                order.move_to_end(first, last=False)
                return count
        return len(blocks)


class RankedLanes:
    """Blocks by rank, those of one rank in the order in which they came to it. Mutated by every call.

    lanes: the blocks of each rank with their stamps; ranks: a heap of the ranks that have had blocks lately. A block
    that is locked and stands first is set aside until it is unlocked or moved.
    """

    __slots__ = ("_aside", "_back", "_stamp", "lanes", "ranks")

    def __init__(self) -> None:
        self.lanes: dict[float, OrderedDict[int, int]] = {}
        self.ranks: list[float] = []
        self._aside: dict[int, tuple[float, int]] = {}
        self._back: list[tuple[float, int, int]] = []
        self._stamp = 0

    @property
    def is_plain(self) -> bool:
        """True where nothing is set aside."""
        return not self._aside

    def put(self, block: int, rank: float) -> None:
        """Add a block that is not there behind all others of its rank."""
        self._stamp += 1
        lane = self.lanes.get(rank)
        if lane is None:
            lane = self.lanes[rank] = OrderedDict()
            heappush(self.ranks, rank)
        lane[block] = self._stamp

    def reserve(self, count: int) -> int:
        """The first of `count` stamps, for blocks that the caller adds to `lanes` itself."""
        first = self._stamp + 1
        self._stamp += count
        return first

    def discard(self, block: int, rank: float) -> None:
        """Take a block out of its rank."""
        if self._aside.pop(block, None) is None:
            del self.lanes[rank][block]

    def unlocked(self, block: int, locked: Set[int]) -> None:
        """A block may be first again."""
        place = self._aside.get(block)
        if place is None:
            return
        heappush(self._back, (*place, block))
        if len(self._back) > 2 * len(self._aside) + _SLACK:
            self._back = [(*place, each) for each, place in self._aside.items() if each not in locked]
            heapify(self._back)

    def first(self, locked: Set[int]) -> int | None:
        """The block of the lowest rank that is not locked, of equals the one that came first; None without any."""
        back, aside = self._back, self._aside
        while back and (back[0][2] in locked or aside.get(back[0][2]) != back[0][:2]):
            heappop(back)
        ranks, lanes = self.ranks, self.lanes
        while ranks:
            rank = ranks[0]
            lane = lanes[rank]
            while lane:
                block = next(iter(lane))
                if block not in locked:
                    if back and back[0][:2] < (rank, lane[block]):
                        return back[0][2]
                    return block
                aside[block] = (rank, lane.pop(block))
            del lanes[heappop(ranks)]
        return back[0][2] if back else None


class StampedQueue:
    """Blocks in ascending order of a stamp (a count that only grows). Mutated by `put` and `discard`.

    A block with the newest stamp goes to the end of an ordered dictionary, O(1). A block that comes back to an earlier
    place waits in a heap beside it, O(log n). No two blocks have one stamp.
    """

    __slots__ = ("_heap", "_returned", "order")

    def __init__(self) -> None:
        self.order: OrderedDict[int, int] = OrderedDict()
        self._returned: dict[int, int] = {}
        self._heap: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self.order) + len(self._returned)

    @property
    def is_plain(self) -> bool:
        """True where `order` is all there is."""
        return not self._returned

    def put(self, block: int, stamp: int) -> None:
        """Add a block, or move it to a newer stamp."""
        order = self.order
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

    def discard(self, block: int) -> bool:
        """Take a block out; False where it is not there."""
        if self.order.pop(block, None) is not None:
            return True
        return self._returned.pop(block, None) is not None

    def first(self) -> tuple[int, int] | None:
        """(stamp, block) of the earliest block; None where the queue is empty."""
        order = self.order
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


class Ghosts(Generic[T]):
    """Keys of blocks that were evicted, with what is remembered of each: the last `limit` of them.

    Mutated by `put`, `take` and `drop_oldest`, O(1) each, and `resize`. keys: the oldest first; policies may take from
    it, and add to its end as long as they keep the limit.
    """

    __slots__ = ("keys", "limit")

    def __init__(self, limit: int) -> None:
        self.keys: OrderedDict[bytes, T] = OrderedDict()
        self.limit = limit

    def __len__(self) -> int:
        return len(self.keys)

    def __contains__(self, key: bytes) -> bool:
        return key in self.keys

    def put(self, key: bytes, memory: T) -> None:
        """Remember a key as the latest; the oldest beyond the limit is forgotten."""
        self.keys[key] = memory
        self.keys.move_to_end(key)
        if len(self.keys) > self.limit:
            self.keys.popitem(last=False)

    def take(self, key: bytes) -> T | None:
        """Forget a key; what was remembered of it, or None where it is not here."""
        return self.keys.pop(key, None)

    def drop_oldest(self) -> None:
        """Forget the key that was evicted first, if there is one."""
        if self.keys:
            self.keys.popitem(last=False)

    def resize(self, limit: int) -> None:
        """Remember so many from now on."""
        self.limit = limit
        while len(self.keys) > limit:
            self.keys.popitem(last=False)
