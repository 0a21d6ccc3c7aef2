"""Queues and heaps that policies are made of, in which nothing that is locked is walked past twice.

Owns setting a locked block aside when it stands first, and putting it back where it stood. What a place means (last
use, frequency, worth) is each policy's own.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence, Set
from heapq import heapify, heappop, heappush
from typing import Any, Generic, TypeVar

_SLACK = 64
T = TypeVar("T")
E = TypeVar("E", bound=tuple[Any, ...])


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

    lanes: the blocks of each rank with their stamps; ranks: a heap of the ranks that have a lane, and of some that had
    one. A lane that `discard` empties goes: a block that is used over and over leaves one behind at every use. A block
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
        self.lane(rank)[block] = self._stamp

    def lane(self, rank: float) -> OrderedDict[int, int]:
        """The blocks of a rank; an empty one begins where there is none."""
        lane = self.lanes.get(rank)
        if lane is None:
            lane = self.lanes[rank] = OrderedDict()
            heappush(self.ranks, rank)
        return lane

    def reserve(self, count: int) -> int:
        """The first of `count` stamps, for blocks that the caller adds to `lanes` itself."""
        first = self._stamp + 1
        self._stamp += count
        return first

    def discard(self, block: int, rank: float) -> None:
        """Take a block out of its rank."""
        if self._aside and self._aside.pop(block, None) is not None:
            return
        lane = self.lanes[rank]
        del lane[block]
        if not lane:
            del self.lanes[rank]
            if len(self.ranks) > 2 * len(self.lanes) + _SLACK:
                self.ranks[:] = self.lanes
                heapify(self.ranks)

    def lowest(self) -> OrderedDict[int, int]:
        """The blocks of the lowest rank that has any, where there are some in `lanes`."""
        ranks, lanes = self.ranks, self.lanes
        while not (lane := lanes.get(ranks[0])):
            lanes.pop(heappop(ranks), None)
        return lane

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
            lane = lanes.get(rank)
            while lane:
                block = next(iter(lane))
                if block not in locked:
                    if back and back[0][:2] < (rank, lane[block]):
                        return back[0][2]
                    return block
                aside[block] = (rank, lane.pop(block))
            lanes.pop(heappop(ranks), None)
        return back[0][2] if back else None


class EntryQueue(Generic[E]):
    """Entries in ascending order of their stamps. Mutated by policies and by every call.

    order: policies append to it what has the newest stamp; returned: a heap of those that came back to an earlier
    place. Both may hold entries that do not hold any more (`Queues`).
    """

    __slots__ = ("order", "returned")

    def __init__(self) -> None:
        self.order: deque[E] = deque()
        self.returned: list[E] = []

    def first(self, entries: Mapping[int, E]) -> E | None:
        """The earliest entry that holds; None without any. Drops what stands before it."""
        order, returned = self.order, self.returned
        while order and entries.get(order[0][1]) is not order[0]:
            order.popleft()
        while returned and entries.get(returned[0][1]) is not returned[0]:
            heappop(returned)
        if returned and (not order or returned[0] < order[0]):
            return returned[0]
        return order[0] if order else None

    def take(self, entry: E) -> bool:
        """Take an entry out if it stands first in `order` or `returned`; False where it stays until it does."""
        if self.order and self.order[0] is entry:
            self.order.popleft()
            return True
        if self.returned and self.returned[0] is entry:
            heappop(self.returned)
            return True
        return False

    def sweep(self, entries: Mapping[int, E]) -> None:
        """Drop what does not hold, and let what came back stand in `order`. O(n log n)."""
        live = [each for each in self.order if entries.get(each[1]) is each]
        if self.returned:
            live += [each for each in self.returned if entries.get(each[1]) is each]
            live.sort()
        self.order, self.returned = deque(live), []


class Queues(Generic[E]):
    """Queues of blocks' entries, by numbers that a policy chooses. Mutated by every call and by policies.

    An entry is a tuple (stamp, block, ...); no two have one stamp, a count that only grows. entries: by block, those
    that hold. An entry that was replaced or deleted there stays in its queue and is passed over when it stands first,
    which costs less than to take it out; when more of them may have been left behind than there are blocks, all queues
    are swept. So a call costs O(1), amortised, and O(log n) where a block was set aside: a locked block that stands
    first is in no queue until it is unlocked.
    """

    __slots__ = ("_aside", "_has_returned", "_num_left", "entries", "queues")

    def __init__(self) -> None:
        self.entries: dict[int, E] = {}
        self.queues: dict[float, EntryQueue[E]] = {}
        self._aside: set[int] = set()
        self._has_returned = False
        self._num_left = 0

    @property
    def is_plain(self) -> bool:
        """True where nothing is set aside or has come back from there, so that `order` of each queue is all of it."""
        return not self._aside and not self._has_returned

    def leave(self, entry: E, name: float) -> None:
        """An entry of the queue `name` has been deleted or replaced in `entries`."""
        if entry[1] in self._aside:
            self._aside.remove(entry[1])
        elif not self.queues[name].take(entry):
            self.left(1)

    def left(self, count: int) -> None:
        """So many entries do not hold any more and may be in their queues yet."""
        self._num_left += count
        if self._num_left > len(self.entries) + _SLACK:
            self._num_left, self._has_returned = 0, False
            for queue in self.queues.values():
                queue.sweep(self.entries)

    def first(self, name: float, locked: Set[int]) -> int | None:
        """The earliest block of a queue that is not locked; None without any."""
        queue = self.queues[name]
        while (entry := queue.first(self.entries)) is not None:
            if entry[1] not in locked:
                return int(entry[1])
            queue.take(entry)
            self._aside.add(entry[1])
        return None

    def clear(self) -> None:
        """No queues any more; entries and what is set aside stay. The caller makes queues anew."""
        self.queues.clear()
        self._has_returned, self._num_left = False, 0

    def is_aside(self, block: int) -> bool:
        """True where a block was locked when it stood first, and has not been unlocked since."""
        return block in self._aside

    def put_back(self, block: int, name: float) -> None:
        """A block that is set aside was unlocked; its place is in the queue `name`, which is there."""
        self._aside.remove(block)
        self._has_returned = True
        heappush(self.queues[name].returned, self.entries[block])


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
