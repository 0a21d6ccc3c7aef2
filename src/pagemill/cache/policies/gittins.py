"""Gittins: the block leaves whose place earns least, by what was learned of how soon blocks like it are used again.

Owns the classes of blocks and their order; the learning is in `reuse.py`. The class of a block is its number of uses
(ghosts keep it for evicted blocks), where a setting asks for it with the time between the last two; of a block that
was used once, whether it is full, whether its text went on from a known one, and how long that text is. The idea of
ranking by hits per time, from the ages at which blocks of a class hit, is that of LHD (Beckmann et al., "LHD: improving
cache hit rate by maximizing hit density", NSDI 2018); here the ages of evicted blocks count too, the index looks ahead
to the best time to stop, and the victim is exact instead of sampled.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from pagemill.cache.policies.base import BlockInfo, OneByOne
from pagemill.cache.policies.order import Ghosts, StampedQueue
from pagemill.cache.policies.reuse import LearnerSetting, ReuseLearner

_GHOSTS_PER_BLOCK = 4
_EPOCHS_PER_REFRESH = 4
_SOONEST_REFRESH = 500
_NEVER = (0, 0)
_USES = (2, 3, 4, 5, 8, 16)


@dataclass(frozen=True, slots=True)
class GittinsSetting:
    """Constants of the classes; scripts/tune_gittins.py chose them.

    gaps: limits of the time between a block's last two uses, in capacities. lengths: limits of the length of a text, in
    tokens. once: expected level of reuse of blocks used once whose text's length is below each of these limits and
    above all; part_filled, continued: of others used once. again: of blocks used 2, 3, 4, 5-7, 8-15 times and more.
    known_blocks: a text with so many known blocks goes on from another one.
    """

    gaps: tuple[float, ...] = ()
    lengths: tuple[int, ...] = (4096, 8192, 16384, 49152)
    once: tuple[float, ...] = (1.0, 0.8, 0.6, 0.5, 0.4)
    part_filled: float = 0.1
    continued: float = 0.15
    again: tuple[float, ...] = (2.83, 5.2, 8.0, 14.7, 36.5, 89.4)
    known_blocks: int = 2
    learner: LearnerSetting = field(default_factory=LearnerSetting)


class Gittins(OneByOne):
    """A row of queues by last use for each class and bucket of age; the first of the row with the lowest index leaves.

    Mutated by every call. Blocks used in one epoch (a 16th of the capacity in uses) share a queue, and it is queues
    that move to the next bucket as they age, so that a call costs O(1) in blocks, amortised, whatever is locked. The
    index is computed anew four times per capacity.
    """

    name = "gittins"

    def __init__(self, capacity: int, setting: GittinsSetting | None = None) -> None:
        assert capacity > 0
        self._setting = setting = setting or GittinsSetting()
        num_gaps = len(setting.gaps) + 1
        self._levels = (
            setting.part_filled, setting.continued, *setting.once,
            *(level for level in setting.again for _ in range(num_gaps)),
        )  # fmt: skip
        first_again = 2 + len(setting.once)
        self._groups = (0, 1, *(2 for _ in setting.once), *(3 + i // num_gaps for i in range(num_gaps * len(_USES))))
        # First class of a number of uses, by that number.
        self._kinds = [first_again + (bisect_right(_USES, uses) - 1) * num_gaps for uses in range(_USES[-1] + 1)]
        self._entries: dict[int, tuple[int, int, int, bytes]] = {}  # last use, class, uses, key
        self._ghosts: Ghosts[tuple[int, int]] = Ghosts(_GHOSTS_PER_BLOCK * capacity)
        self._locked: set[int] = set()
        self._aside: set[int] = set()  # locked when they were first in a row
        self._most_tokens = 0
        self._now = 0
        self._epoch = 0
        self._begin(capacity)

    def _begin(self, capacity: int) -> None:
        """Learner and rows for a capacity."""
        self._learner = ReuseLearner(capacity, self._levels, self._groups, self._setting.learner)
        self._buckets = self._learner.num_buckets
        self._gaps = tuple(capacity * gap for gap in self._setting.gaps)
        self._epoch_uses = self._learner.epoch_uses
        self._mask = self._learner.mask
        self._epoch_end = (self._now // self._epoch_uses + 1) * self._epoch_uses
        self._epoch = self._now // self._epoch_uses
        self._refresh_every = max(_EPOCHS_PER_REFRESH, _SOONEST_REFRESH // self._epoch_uses)
        # Queues by class and epoch; epochs by row (class x buckets + bucket), the earliest first.
        self._queues: list[dict[int, StampedQueue]] = [{} for _ in self._levels]
        self._rows: list[dict[int, StampedQueue]] = [{} for _ in range(len(self._levels) * self._buckets)]
        self._order: list[int] = []
        self._places = [0] * len(self._rows)
        self._filled: list[int] = []
        self._refresh()

    def __contains__(self, block: int) -> bool:
        return block in self._entries

    def insert(self, block: int, key: bytes, info: BlockInfo) -> None:
        assert block not in self._entries, f"block {block} is known already"
        if info.num_tokens > self._most_tokens:
            self._most_tokens = info.num_tokens
        uses, used = self._ghosts.take(key) or (0, 0)
        self._use(block, key, uses, used, self._first_kind(info))

    def touch_all(self, blocks: Sequence[int]) -> None:
        assert all(map(self._entries.__contains__, blocks)), "a block is not known"
        for block in blocks:
            used, kind, uses, key = self._entries[block]
            self._leave(block, used, kind)
            self._use(block, key, uses, used, kind)

    def replace(self, blocks: Sequence[int], keys: Sequence[bytes], infos: Sequence[BlockInfo]) -> list[int]:
        entries, victims = self._entries, []
        if self._locked or not entries:
            return super().replace(blocks, keys, infos)
        assert not any(map(entries.__contains__, blocks)), "a block is known already"
        ghosts, limit = self._ghosts.keys, self._ghosts.limit
        rows, queues, record, mask = self._rows, self._queues, self._learner.record, self._mask
        for block, key, info in zip(blocks, keys, infos, strict=True):
            epochs = rows[self._order[self._filled[0]]]
            queue = next(iter(epochs.values()), None)
            if queue and queue.is_plain:
                victim, _ = queue.order.popitem(last=False)
                used, kind, uses, gone = entries.pop(victim)
                ghosts[gone] = (uses, used)
                if len(ghosts) > limit:
                    ghosts.popitem(last=False)
            else:
                first = self.victim()
                assert first is not None, "nothing is locked"
                self.remove(first, True)
                victim = first
            victims.append(victim)
            if info.num_tokens > self._most_tokens:
                self._most_tokens = info.num_tokens
            now = self._now = self._now + 1
            if now >= self._epoch_end:
                self._next_epoch()
            uses, used = ghosts.pop(key, _NEVER)
            if uses:
                kind = self._kinds[min(uses + 1, _USES[-1])] + bisect_right(self._gaps, now - used)
            else:
                kind = self._first_kind(info)
            entries[block] = (now, kind, uses + 1, key)
            epoch = self._epoch
            if not key[0] & mask:
                record(key, epoch, kind)
            queue = queues[kind].get(epoch)
            if queue is None:
                queue = self._queue(kind, epoch)
            queue.order[block] = now
        return victims

    def touch(self, block: int) -> None:
        assert block in self._entries, f"block {block} is not known"
        used, kind, uses, key = self._entries[block]
        self._leave(block, used, kind)
        self._use(block, key, uses, used, kind)

    def lock(self, block: int) -> None:
        assert block in self._entries, f"block {block} is not known"
        assert block not in self._locked, f"block {block} is locked already"
        self._locked.add(block)

    def unlock(self, block: int) -> None:
        assert block in self._locked, f"block {block} is not locked"
        self._locked.remove(block)
        if block in self._aside:
            self._aside.remove(block)
            used, kind, _, _ = self._entries[block]
            self._queue(kind, self._epoch_of(used)).put(block, used)

    def victim(self) -> int | None:
        filled, order, buckets, locked = self._filled, self._order, self._buckets, self._locked
        while filled:
            row = order[filled[0]]
            epochs = self._rows[row]
            for epoch in list(epochs):
                queue = epochs[epoch]
                while (first := queue.first()) is not None:
                    if first[1] not in locked:
                        return first[1]
                    queue.discard(first[1])
                    self._aside.add(first[1])
                del epochs[epoch], self._queues[row // buckets][epoch]
            heappop(filled)
        return None

    def remove(self, block: int, evicted: bool) -> None:
        assert block in self._entries, f"block {block} is not known"
        used, kind, uses, key = self._entries.pop(block)
        self._leave(block, used, kind)
        self._locked.discard(block)
        if evicted:
            self._ghosts.put(key, (uses, used))

    def on_miss(self, key: bytes) -> None:
        pass

    def resize(self, capacity: int) -> None:
        assert capacity > 0
        learner = self._learner
        self._ghosts.resize(_GHOSTS_PER_BLOCK * capacity)
        self._begin(capacity)
        self._learner.take_over(learner, self._epoch)
        for block, (used, kind, _, _) in sorted(self._entries.items(), key=lambda entry: entry[1][0]):
            if block not in self._aside:
                self._queue(kind, self._epoch_of(used)).put(block, used)
        self._refresh()

    def _first_kind(self, info: BlockInfo) -> int:
        """The class of a block that is used for the first time."""
        setting = self._setting
        if info.num_tokens < self._most_tokens:
            return 0
        if info.num_known_blocks >= setting.known_blocks:
            return 1
        return 2 + bisect_right(setting.lengths, info.text_tokens)

    def _use(self, block: int, key: bytes, uses: int, before: int, kind: int) -> None:
        """A block that stands in no queue is used. uses, before: earlier ones and the last; kind: its class without."""
        now = self._now = self._now + 1
        if now >= self._epoch_end:
            self._next_epoch()
        if uses:
            kind = self._kinds[min(uses + 1, _USES[-1])] + bisect_right(self._gaps, now - before)
        self._entries[block] = (now, kind, uses + 1, key)
        if not key[0] & self._mask:
            self._learner.record(key, self._epoch, kind)
        queue = self._queues[kind].get(self._epoch)
        if queue is None:
            queue = self._queue(kind, self._epoch)
        queue.order[block] = now  # the latest stamp of all

    def _leave(self, block: int, used: int, kind: int) -> None:
        """Take a block out of its queue."""
        if block in self._aside:
            self._aside.remove(block)
        else:
            self._queues[kind][self._epoch_of(used)].discard(block)

    def _epoch_of(self, used: int) -> int:
        """The epoch of a use; -1 for all that are in the last bucket, whose blocks share a queue."""
        epoch = used // self._epoch_uses
        return epoch if self._epoch - epoch < self._learner.edges[-1] else -1

    def _queue(self, kind: int, epoch: int) -> StampedQueue:
        """The queue of a class and an epoch, made where there is none."""
        queue = self._queues[kind].get(epoch)
        if queue is None:
            queue = self._queues[kind][epoch] = StampedQueue()
            bucket = self._buckets - 1 if epoch < 0 else self._learner.bucket(self._epoch - epoch)
            self._enter(kind * self._buckets + bucket, epoch, queue)
        return queue

    def _enter(self, row: int, epoch: int, queue: StampedQueue) -> None:
        epochs = self._rows[row]
        if not epochs:
            heappush(self._filled, self._places[row])
        is_last = not epochs or next(reversed(epochs)) < epoch
        epochs[epoch] = queue
        if not is_last:
            self._rows[row] = dict(sorted(epochs.items()))

    def _next_epoch(self) -> None:
        """Move queues whose age has passed the end of their bucket."""
        self._epoch += 1
        self._epoch_end += self._epoch_uses
        self._learner.advance(self._epoch)
        for kind, queues in enumerate(self._queues):
            if queues:
                self._age(kind, queues)
        if self._epoch % self._refresh_every == 0:
            self._refresh()

    def _age(self, kind: int, queues: dict[int, StampedQueue]) -> None:
        last = self._buckets - 1
        for bucket, edge in enumerate(self._learner.edges):
            epoch = self._epoch - edge
            queue = queues.get(epoch)
            if queue is None:
                continue
            row = kind * self._buckets + bucket
            del self._rows[row][epoch]
            if not queue:
                del queues[epoch]
            elif bucket + 1 < last:
                self._enter(row + 1, epoch, queue)
            else:
                del queues[epoch]
                oldest = self._queue(kind, -1)
                while (first := queue.first()) is not None:
                    queue.discard(first[1])
                    oldest.put(first[1], first[0])

    def _refresh(self) -> None:
        """Order the rows by the index learned; of equals the older bucket first."""
        table = self._learner.refresh(self._epoch)
        index = [each for row in table for each in row]
        self._order = sorted(range(len(index)), key=lambda row: (index[row], -(row % self._buckets), row))
        for place, row in enumerate(self._order):
            self._places[row] = place
        self._filled = [place for place, row in enumerate(self._order) if self._rows[row]]
