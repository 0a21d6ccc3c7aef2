"""S3-FIFO: a small queue filters what is used once, a main queue keeps the rest, ghosts tell who came back too late.

Owns its order. Source: Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023: small queue 10 %,
ghosts as many as the main queue has room for, counts up to 3.
"""

from __future__ import annotations

from collections.abc import Sequence

from pagemill.cache.policies.base import BlockInfo, OneByOne
from pagemill.cache.policies.order import Ghosts, Lane

_SMALL_SHARE = 0.1
_MOST_USES = 3


class S3FIFO(OneByOne):
    """Two queues and ghosts. Mutated by every call; a hit only counts, blocks move when a victim is looked for."""

    name = "s3fifo"

    def __init__(self, capacity: int) -> None:
        assert capacity > 0
        self._room_small = max(1, int(capacity * _SMALL_SHARE))
        self._ghosts: Ghosts[None] = Ghosts(max(1, capacity - self._room_small))
        self._uses: dict[int, int] = {}
        self._keys: dict[int, bytes] = {}
        self._small = Lane()
        self._main = Lane()
        self._locked: set[int] = set()

    def __contains__(self, block: int) -> bool:
        return block in self._uses

    def insert(self, block: int, key: bytes, info: BlockInfo) -> None:
        assert block not in self._uses, f"block {block} is known already"
        self._uses[block] = 0
        self._keys[block] = key
        if key in self._ghosts:
            self._ghosts.take(key)
            self._main.order[block] = None
        else:
            self._small.order[block] = None

    def touch(self, block: int) -> None:
        assert block in self._uses, f"block {block} is not known"
        uses = self._uses[block]
        if uses < _MOST_USES:
            self._uses[block] = uses + 1

    def lock(self, block: int) -> None:
        assert block in self._uses, f"block {block} is not known"
        assert block not in self._locked, f"block {block} is locked already"
        self._locked.add(block)

    def unlock(self, block: int) -> None:
        assert block in self._locked, f"block {block} is not locked"
        self._locked.remove(block)
        self._small.unlocked(block, self._locked)
        self._main.unlocked(block, self._locked)

    def victim(self) -> int | None:
        """Moves blocks that have earned it to the main queue's end on the way: at most four moves for each hit."""
        small, main, uses, locked = self._small, self._main, self._uses, self._locked
        while True:
            from_small = len(small) >= self._room_small
            block = (small if from_small else main).first(locked)
            if block is None:
                from_small = not from_small
                block = (small if from_small else main).first(locked)
                if block is None:
                    return None
            count = uses[block]
            if count <= (1 if from_small else 0):
                return block
            if from_small:
                small.discard(block)
                uses[block] = 0
            else:
                uses[block] = count - 1
            main.put(block)

    def remove(self, block: int, evicted: bool) -> None:
        assert block in self._uses, f"block {block} is not known"
        del self._uses[block]
        key = self._keys.pop(block)
        self._locked.discard(block)
        if not self._small.discard(block):
            self._main.discard(block)
        elif evicted:
            self._ghosts.put(key, None)

    def on_miss(self, key: bytes) -> None:
        pass

    def touch_all(self, blocks: Sequence[int]) -> None:
        uses = self._uses
        assert all(map(uses.__contains__, blocks)), "a block is not known"
        for block in blocks:
            count = uses[block]
            if count < _MOST_USES:
                uses[block] = count + 1

    def replace(self, blocks: Sequence[int], keys: Sequence[bytes], infos: Sequence[BlockInfo]) -> list[int]:
        uses, victims = self._uses, []
        if self._locked or not uses or not (self._small.is_plain and self._main.is_plain):
            return super().replace(blocks, keys, infos)
        assert uses.keys().isdisjoint(blocks), "a block is known already"
        small, main, known = self._small.order, self._main.order, self._keys
        ghosts, limit, room = self._ghosts.keys, self._ghosts.limit, self._room_small
        for block, key in zip(blocks, keys, strict=True):
            while True:
                if len(small) >= room or not main:
                    victim, _ = small.popitem(last=False)
                    count = uses.pop(victim)
                    if count <= 1:
                        ghosts[known.pop(victim)] = None
                        if len(ghosts) > limit:
                            ghosts.popitem(last=False)
                        break
                    uses[victim] = 0
                    main[victim] = None
                else:
                    victim, _ = main.popitem(last=False)
                    count = uses.pop(victim)
                    if not count:
                        del known[victim]
                        break
                    uses[victim] = count - 1
                    main[victim] = None
            victims.append(victim)
            uses[block] = 0
            known[block] = key
            if key in ghosts:
                del ghosts[key]
                main[block] = None
            else:
                small[block] = None
        return victims

    def resize(self, capacity: int) -> None:
        assert capacity > 0
        self._room_small = max(1, int(capacity * _SMALL_SHARE))
        self._ghosts.resize(max(1, capacity - self._room_small))
