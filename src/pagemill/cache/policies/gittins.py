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
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from pagemill.cache.policies.base import BlockInfo, OneByOne
from pagemill.cache.policies.order import EntryQueue, Ghosts, Queues
from pagemill.cache.policies.reuse import LearnerSetting, ReuseLearner

_GHOSTS_PER_BLOCK = 4
_EPOCHS_PER_REFRESH = 4
_SOONEST_REFRESH = 500
_USES = (2, 3, 4, 5, 8, 16)
_Entry = tuple[int, int, int, int, bytes]  # last use, block, class, uses, key


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
        self._num_kinds = len(self._levels)
        first_again = 2 + len(setting.once)
        self._groups = (0, 1, *(2 for _ in setting.once), *(3 + i // num_gaps for i in range(num_gaps * len(_USES))))
        # First class of a number of uses, by that number.
        self._kinds = [first_again + (bisect_right(_USES, uses) - 1) * num_gaps for uses in range(_USES[-1] + 1)]
        self._queues: Queues[_Entry] = Queues()  # by class and epoch, `_name`
        self._entries = self._queues.entries
        self._ghosts: Ghosts[_Entry] = Ghosts(_GHOSTS_PER_BLOCK * capacity)
        self._locked: set[int] = set()
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
        self._epoch = self._learner.epoch = self._now // self._epoch_uses
        self._refresh_every = max(_EPOCHS_PER_REFRESH, _SOONEST_REFRESH // self._epoch_uses)
        self._queues.clear()
        self._classes: dict[int, set[int]] = {}  # by epoch, those that had a queue
        # Epochs by row (class x buckets + bucket), the earliest first.
        self._rows: list[dict[int, EntryQueue[_Entry]]] = [{} for _ in range(len(self._levels) * self._buckets)]
        self._order: list[int] = []
        self._places = [0] * len(self._rows)
        self._filled: list[int] = []
        self._refresh()

    def __contains__(self, block: int) -> bool:
        return block in self._entries

    def insert(self, block: int, key: bytes, info: BlockInfo) -> None:
        assert block not in self._entries, f"block {block} is known already"
        self._use(block, key, self._first_kind(info), self._ghosts.take(key))

    def touch_all(self, blocks: Sequence[int]) -> None:
        entries = self._entries
        assert all(map(entries.__contains__, blocks)), "a block is not known"
        if not self._queues.is_plain:
            for block in blocks:
                self.touch(block)
            return
        kinds, gaps, most, mask = self._kinds, self._gaps, _USES[-1], self._mask
        queues, learner = self._queues.queues, self._learner
        for block in blocks:
            used, _, _, uses, key = entries[block]
            now = self._now = self._now + 1
            if now >= self._epoch_end:
                self._next_epoch()
            uses += 1
            kind = kinds[uses if uses < most else most]
            if gaps:
                kind += bisect_right(gaps, now - used)
            entries[block] = entry = (now, block, kind, uses, key)
            if not key[0] & mask:
                learner.keys.append(key)
                learner.kinds.append(kind)
            queue = queues.get(self._epoch * self._num_kinds + kind) or self._queue(kind, self._epoch)
            queue.order.append(entry)
        self._queues.left(len(blocks))

    def replace(self, blocks: Sequence[int], keys: Sequence[bytes], infos: Sequence[BlockInfo]) -> list[int]:
        entries, victims = self._entries, []
        if self._locked or not entries or not self._queues.is_plain:
            return super().replace(blocks, keys, infos)
        assert entries.keys().isdisjoint(blocks), "a block is known already"
        ghosts, limit = self._ghosts.keys, self._ghosts.limit
        queues, now, epoch_end, first_kind = self._queues.queues, self._now, self._epoch_end, 0
        seen_keys, seen_kinds, mask = self._learner.keys, self._learner.kinds, self._mask
        first: deque[_Entry] | None = None  # whose first one leaves next
        into: deque[_Entry] | None = None  # of this epoch and the class `latest`
        tokens = length = known = latest = -1
        for block, key, info in zip(blocks, keys, infos, strict=True):
            while True:
                if not first:
                    first, into = self._lowest(), None
                entry = first.popleft()
                victim = entry[1]
                if entries.get(victim) is entry:
                    break
            del entries[victim]
            victims.append(victim)
            ghosts[entry[4]] = entry
            if len(ghosts) > limit:
                ghosts.popitem(last=False)
            if info.num_tokens != tokens or info.text_tokens != length or info.num_known_blocks != known:
                tokens, length, known = info.num_tokens, info.text_tokens, info.num_known_blocks
                first_kind = self._first_kind(info)
            now += 1
            if now >= epoch_end:
                self._next_epoch()
                first, into, epoch_end = None, None, self._epoch_end
            kind, uses = first_kind, 1
            if key in ghosts:
                ghost = ghosts.pop(key)
                uses = ghost[3] + 1
                kind = self._kinds[min(uses, _USES[-1])] + bisect_right(self._gaps, now - ghost[0])
            entries[block] = entry = (now, block, kind, uses, key)
            if not key[0] & mask:
                seen_keys.append(key)
                seen_kinds.append(kind)
            if into is None or kind != latest:
                queue = queues.get(self._epoch * self._num_kinds + kind)
                if queue is None:
                    queue, first = self._queue(kind, self._epoch), None
                into, latest = queue.order, kind
            into.append(entry)
        self._now = now
        return victims

    def touch(self, block: int) -> None:
        assert block in self._entries, f"block {block} is not known"
        entry = self._entries.pop(block)
        self._queues.leave(entry, self._name(entry))
        self._use(block, entry[4], entry[2], entry)

    def lock(self, block: int) -> None:
        assert block in self._entries, f"block {block} is not known"
        assert block not in self._locked, f"block {block} is locked already"
        self._locked.add(block)

    def unlock(self, block: int) -> None:
        assert block in self._locked, f"block {block} is not locked"
        self._locked.remove(block)
        if self._queues.is_aside(block):
            used, _, kind, _, _ = entry = self._entries[block]
            self._queue(kind, self._epoch_of(used))
            self._queues.put_back(block, self._name(entry))

    def victim(self) -> int | None:
        filled, order, queues = self._filled, self._order, self._queues
        while filled:
            row = order[filled[0]]
            epochs = self._rows[row]
            while epochs:
                epoch = next(iter(epochs))
                name = epoch * self._num_kinds + row // self._buckets
                block = queues.first(name, self._locked)
                if block is not None:
                    return block
                del epochs[epoch], queues.queues[name]
            heappop(filled)
        return None

    def _lowest(self) -> deque[_Entry]:
        """The queue whose first block leaves next, where nothing is locked and all is plain."""
        block = self.victim()
        assert block is not None, "nothing is locked"
        return self._queues.queues[self._name(self._entries[block])].order

    def remove(self, block: int, evicted: bool) -> None:
        assert block in self._entries, f"block {block} is not known"
        entry = self._entries.pop(block)
        self._queues.leave(entry, self._name(entry))
        self._locked.discard(block)
        if evicted:
            self._ghosts.put(entry[4], entry)

    def on_miss(self, key: bytes) -> None:
        pass

    def resize(self, capacity: int) -> None:
        assert capacity > 0
        learner = self._learner
        self._ghosts.resize(_GHOSTS_PER_BLOCK * capacity)
        aside = {block for block in self._locked if self._queues.is_aside(block)}
        self._begin(capacity)
        self._learner.take_over(learner, self._epoch)
        for entry in sorted(self._entries.values()):
            if entry[1] not in aside:
                self._queue(entry[2], self._epoch_of(entry[0])).order.append(entry)
        self._refresh()

    def _first_kind(self, info: BlockInfo) -> int:
        """The class of a block that is used for the first time; learns how long full blocks are."""
        setting = self._setting
        if info.num_tokens < self._most_tokens:
            return 0
        self._most_tokens = info.num_tokens
        if info.num_known_blocks >= setting.known_blocks:
            return 1
        return 2 + bisect_right(setting.lengths, info.text_tokens)

    def _use(self, block: int, key: bytes, kind: int, before: _Entry | None) -> None:
        """A block that is not in `entries` is used. before: its last use; kind: its class where there was none."""
        now = self._now = self._now + 1
        if now >= self._epoch_end:
            self._next_epoch()
        uses = 1
        if before is not None:
            uses = before[3] + 1
            kind = self._kinds[min(uses, _USES[-1])] + bisect_right(self._gaps, now - before[0])
        self._entries[block] = entry = (now, block, kind, uses, key)
        if not key[0] & self._mask:
            self._learner.record(key, self._epoch, kind)
        self._queue(kind, self._epoch).order.append(entry)  # the latest stamp of all

    def _name(self, entry: _Entry) -> int:
        """Of the queue of an entry."""
        return self._epoch_of(entry[0]) * self._num_kinds + entry[2]

    def _epoch_of(self, used: int) -> int:
        """The epoch of a use; -1 for all that are in the last bucket, whose blocks share a queue."""
        epoch = used // self._epoch_uses
        return epoch if self._epoch - epoch < self._learner.edges[-1] else -1

    def _queue(self, kind: int, epoch: int) -> EntryQueue[_Entry]:
        """The queue of a class and an epoch, made where there is none."""
        name = epoch * self._num_kinds + kind
        queue = self._queues.queues.get(name)
        if queue is None:
            queue = self._queues.queues[name] = EntryQueue()
            self._classes.setdefault(epoch, set()).add(kind)
            bucket = self._buckets - 1 if epoch < 0 else self._learner.bucket(self._epoch - epoch)
            self._enter(kind * self._buckets + bucket, epoch, queue)
        return queue

    def _enter(self, row: int, epoch: int, queue: EntryQueue[_Entry]) -> None:
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
        for bucket, edge in enumerate(self._learner.edges):
            epoch = self._epoch - edge
            for kind in sorted(self._classes.get(epoch, ())):
                self._age(kind, epoch, bucket)
        self._classes.pop(self._epoch - self._learner.edges[-1], None)
        if self._epoch % self._refresh_every == 0:
            self._refresh()

    def _age(self, kind: int, epoch: int, bucket: int) -> None:
        """A queue, if it is there, goes to the row of the next bucket; blocks of the last one share a queue."""
        queues, entries = self._queues.queues, self._entries
        name = epoch * self._num_kinds + kind
        queue = queues.get(name)
        if queue is None:
            return
        row = kind * self._buckets + bucket
        del self._rows[row][epoch]
        if queue.first(entries) is None:
            del queues[name]
        elif bucket + 2 < self._buckets:
            self._enter(row + 1, epoch, queue)
        else:
            del queues[name]
            queue.sweep(entries)
            self._queue(kind, -1).order.extend(queue.order)

    def _refresh(self) -> None:
        """Order the rows by the index learned; of equals the older bucket first."""
        table = self._learner.refresh(self._epoch)
        index = [each for row in table for each in row]
        self._order = sorted(range(len(index)), key=lambda row: (index[row], -(row % self._buckets), row))
        for place, row in enumerate(self._order):
            self._places[row] = place
        self._filled = [place for place, row in enumerate(self._order) if self._rows[row]]
