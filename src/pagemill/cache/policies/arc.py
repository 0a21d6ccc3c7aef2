"""ARC: one list of blocks used once, one of blocks used again, and ghosts of both that shift the room between them.

Owns its order. Source: Megiddo and Modha, "ARC: a self-tuning, low overhead replacement cache", FAST 2003. As blocks
are evicted before their successor is known, the ghosts are cut to size after an eviction instead of before it.
"""

from __future__ import annotations

from collections.abc import Sequence

from pagemill.cache.policies.base import BlockInfo, OneByOne
from pagemill.cache.policies.order import Ghosts, Lane


class ARC(OneByOne):
    """Two lists by last use with a target for the first. Mutated by every call. A hit costs O(1)."""

    name = "arc"

    def __init__(self, capacity: int) -> None:
        assert capacity > 0
        self._capacity = capacity
        self._target = 0.0
        self._keys: dict[int, bytes] = {}
        self._once = Lane()
        self._again = Lane()
        self._ghosts_once: Ghosts[None] = Ghosts(capacity)
        self._ghosts_again: Ghosts[None] = Ghosts(2 * capacity)
        self._missed_again = False
        self._locked: set[int] = set()

    def __contains__(self, block: int) -> bool:
        return block in self._keys

    def insert(self, block: int, key: bytes, info: BlockInfo) -> None:
        assert block not in self._keys, f"block {block} is known already"
        self._keys[block] = key
        lane = self._once
        for ghosts in (self._ghosts_once, self._ghosts_again):
            if key in ghosts:
                ghosts.take(key)
                lane = self._again
        lane.order[block] = None
        self._missed_again = False

    def touch(self, block: int) -> None:
        assert block in self._keys, f"block {block} is not known"
        self._once.discard(block)
        self._again.put(block)

    def lock(self, block: int) -> None:
        assert block in self._keys, f"block {block} is not known"
        assert block not in self._locked, f"block {block} is locked already"
        self._locked.add(block)

    def unlock(self, block: int) -> None:
        assert block in self._locked, f"block {block} is not locked"
        self._locked.remove(block)
        self._once.unlocked(block, self._locked)
        self._again.unlocked(block, self._locked)

    def victim(self) -> int | None:
        num_once = len(self._once)
        from_once = num_once > self._target or (self._missed_again and num_once == self._target)
        lanes = (self._once, self._again) if num_once and from_once else (self._again, self._once)
        first = lanes[0].first(self._locked)
        return lanes[1].first(self._locked) if first is None else first

    def remove(self, block: int, evicted: bool) -> None:
        assert block in self._keys, f"block {block} is not known"
        key = self._keys.pop(block)
        self._locked.discard(block)
        was_once = self._once.discard(block)
        if not was_once:
            self._again.discard(block)
        if not evicted:
            return
        once, again = self._ghosts_once, self._ghosts_again
        (once if was_once else again).put(key, None)
        if len(self._once) + len(once) >= self._capacity:
            once.drop_oldest()
        if len(self._keys) + len(once) + len(again) >= 2 * self._capacity:
            again.drop_oldest()

    def on_miss(self, key: bytes) -> None:
        """A miss on a ghost shifts the target towards the list that it left."""
        once, again = self._ghosts_once, self._ghosts_again
        self._missed_again = key in again
        if key in once:
            self._target = min(self._capacity, self._target + max(1.0, len(again) / len(once)))
        elif self._missed_again:
            self._target = max(0.0, self._target - max(1.0, len(once) / len(again)))

    def touch_all(self, blocks: Sequence[int]) -> None:
        assert all(map(self._keys.__contains__, blocks)), "a block is not known"
        if not (self._once.is_plain and self._again.is_plain):
            super().touch_all(blocks)
            return
        once, again = self._once.order, self._again.order
        to_end = again.move_to_end
        for block in blocks:
            if block in again:
                to_end(block)
            else:
                del once[block]
                again[block] = None

    def replace(self, blocks: Sequence[int], keys: Sequence[bytes], infos: Sequence[BlockInfo]) -> list[int]:
        known, victims = self._keys, []
        if self._locked or not known or not (self._once.is_plain and self._again.is_plain):
            return super().replace(blocks, keys, infos)
        assert known.keys().isdisjoint(blocks), "a block is known already"
        once, again, capacity = self._once.order, self._again.order, self._capacity
        ghosts_once, ghosts_again = self._ghosts_once.keys, self._ghosts_again.keys
        most_once, most_again = self._ghosts_once.limit, self._ghosts_again.limit
        for block, key in zip(blocks, keys, strict=True):
            was_once, was_again = key in ghosts_once, key in ghosts_again
            if was_once or was_again:
                self.on_miss(key)
            num_once = len(once)
            from_once = num_once > self._target or (was_again and num_once == self._target)
            if (num_once and from_once) or not again:
                victim, _ = once.popitem(last=False)
                ghosts_once[known.pop(victim)] = None
                if len(ghosts_once) > most_once:
                    ghosts_once.popitem(last=False)
                num_once -= 1
            else:
                victim, _ = again.popitem(last=False)
                ghosts_again[known.pop(victim)] = None
                if len(ghosts_again) > most_again:
                    ghosts_again.popitem(last=False)
            if ghosts_once and num_once + len(ghosts_once) >= capacity:
                ghosts_once.popitem(last=False)
            if ghosts_again and len(known) + len(ghosts_once) + len(ghosts_again) >= 2 * capacity:
                ghosts_again.popitem(last=False)
            victims.append(victim)
            known[block] = key
            if was_once:
                was_once = ghosts_once.pop(key, self) is None
            if was_again:
                was_again = ghosts_again.pop(key, self) is None
            (again if was_once or was_again else once)[block] = None
        self._missed_again = False
        return victims

    def resize(self, capacity: int) -> None:
        assert capacity > 0
        self._capacity = capacity
        self._target = min(self._target, capacity)
        self._ghosts_once.resize(capacity)
        self._ghosts_again.resize(2 * capacity)
