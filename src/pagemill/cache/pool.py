"""Fixed-size blocks by id: which are free, held, cached or withdrawn, which await a wipe. Owns no sequence and no byte.

    free ── allocate ──> active (≥ 1 holder) ── release ──> free, its page to be wiped
                            │    ^                └── published ──> cached (no holder) ── unpublish ──> free
                         publish └──────────── retain ──────────────────┘

The free blocks are one list, the next to be taken last, so that taking and giving back a run costs one slice. The order
in which cached blocks leave is a policy's and not kept here.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from pagemill.base.errors import CapacityError, ConfigError, IntegrityError


@dataclass(frozen=True, slots=True)
class PoolCounts:
    """Blocks by state. free + active + cached + held = total. held: taken out of service by a smaller size."""

    num_blocks: int
    num_free: int
    num_active: int
    num_cached: int = 0
    num_held: int = 0


class BlockPool:
    """Allocates blocks 0 .. num_blocks-1. Mutated by every method that is not a question.

    wipes: note every block whose contents were dropped in `dirty`, until the data plane has wiped it; whoever allocates
    has it wiped before it is written. Every operation either happens whole or changes nothing. Raises ConfigError for a
    pool without blocks.

    published: by block, 1 where it may be found by its contents; to be read. dirty: see `wipes`.
    """

    __slots__ = (
        "_free", "_held", "_highest", "_num_active", "_num_cached", "_num_free", "_num_withdrawn",
        "_refs", "_wipes", "_withdrawn", "dirty", "num_blocks", "num_references", "published",
    )  # fmt: skip

    def __init__(self, num_blocks: int, *, wipes: bool = False) -> None:
        if num_blocks < 1:
            raise ConfigError(
                f"the KV cache has {num_blocks} blocks; give it room for at least one: raise kv_cache_memory_bytes"
            )
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # the next to be taken last
        self._refs = [0] * num_blocks
        self._held = bytearray(num_blocks)  # 1 where refs > 0: lets a run of free blocks be found at C speed
        self.published = bytearray(num_blocks)
        self._withdrawn = bytearray(num_blocks)
        self._num_free = num_blocks
        self._num_active = 0
        self._num_cached = 0
        self._num_withdrawn = 0
        self.num_references = 0  # holders of all blocks
        self._highest = -1  # of the blocks ever taken; pages behind it were never written
        self._wipes = wipes
        self.dirty: dict[int, None] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now."""
        return self._num_free

    @property
    def num_active(self) -> int:
        """Blocks with at least one holder."""
        return self._num_active

    @property
    def num_cached(self) -> int:
        """Published blocks without a holder."""
        return self._num_cached

    def counts(self) -> PoolCounts:
        """Blocks by state, now."""
        return PoolCounts(
            self.num_blocks, self._num_free, self._num_active, self._num_cached, self._num_withdrawn
        )  # fmt: skip

    def is_published(self, block: int) -> bool:
        """True where the block may be found by its contents."""
        return bool(self.published[block])

    def num_holders(self, block: int) -> int:
        """How many hold the block: 0 is free."""
        return self._refs[block]

    @property
    def holders(self) -> Sequence[int]:
        """`num_holders` of each block: to be read, not kept."""
        return self._refs

    def num_idle(self, blocks: Iterable[int]) -> int:
        """How many of the blocks nobody holds."""
        refs = self._refs
        return [refs[block] for block in blocks].count(0)

    def can_allocate(self, count: int) -> bool:
        """True where `allocate(count)` will succeed."""
        return count <= self._num_free

    def allocate(self, count: int) -> array[int]:
        """Take `count` blocks, each with one holder, in O(count). Returns their ids, `array('i')`.

        Raises CapacityError, and changes nothing, where fewer are free.
        """
        assert count >= 0
        if count > self._num_free:
            raise self._shortage(f"{count} blocks of the KV cache are needed")
        free = self._free
        if count > len(free):
            raise IntegrityError(f"{self._num_free} blocks of the KV cache are free and {len(free)} are listed as such")
        blocks = array("i", free[: -count - 1 : -1])
        del free[len(free) - count :]
        self._hold(blocks)
        return blocks

    def can_allocate_run(self, count: int) -> bool:
        """True where `allocate_run(count)` will succeed."""
        return self._find_run(count) >= 0

    def allocate_run(self, count: int) -> array[int]:
        """Take `count` blocks with consecutive ids, the lowest such run. Returns their ids, `array('i')`.

        Costs O(num_blocks). Raises CapacityError, and changes nothing, where no such run is free.
        """
        first = self._find_run(count)
        if first < 0:
            raise self._shortage(f"{count} consecutive blocks of the KV cache are needed")
        blocks = array("i", range(first, first + count))
        self._free = [block for block in self._free if not first <= block < first + count]
        self._hold(blocks)
        return blocks

    def retain(self, blocks: Sequence[int]) -> list[int]:
        """Add one holder to each block. All of them must be held or cached, else IntegrityError and no change.

        Returns those that had none, in order.
        """
        refs = self._refs
        for block in blocks:
            if refs[block] <= 0 and not self.published[block]:
                raise IntegrityError(f"block {block} of the KV cache is free and cannot be shared")
        revived = []
        for block in blocks:
            if not refs[block]:
                self._held[block] = 1
                revived.append(block)
            refs[block] += 1
        self._num_cached -= len(revived)
        self._num_active += len(revived)
        self.num_references += len(blocks)
        return revived

    def release(self, blocks: Sequence[int]) -> tuple[list[int], list[int]]:
        """Take one holder from each block; those without any become free, or cached, the last of `blocks` first.

        The next allocation gets them in ascending order of their place in `blocks`. Returns those that became cached
        and those that became free, the last first. Raises IntegrityError, and changes nothing, where a block would be
        freed twice.
        """
        dropped = []
        refs, held, published = self._refs, self._held, self.published
        for block in reversed(blocks):
            left = refs[block] - 1
            refs[block] = left
            if left < 1:
                dropped.append(block)
        if any(map(refs.__getitem__, dropped)):
            [freed, *_] = [block for block in dropped if refs[block]]
            for block in blocks:
                refs[block] += 1
            raise IntegrityError(f"block {freed} of the KV cache was freed twice; nothing was freed this time")
        self.num_references -= len(blocks)
        self._num_active -= len(dropped)
        for block in dropped:
            held[block] = 0
        cached = [block for block in dropped if published[block]]
        free = [block for block in dropped if not published[block]] if len(cached) < len(dropped) else []
        self._num_cached += len(cached)
        self._drop(free)
        return cached, free

    def publish(self, blocks: Sequence[int]) -> None:
        """Held blocks can be found from now on, and stay cached when their last holder leaves."""
        published = self.published
        assert all(map(self._refs.__getitem__, blocks)), f"one of the blocks {blocks} is not held"
        for block in blocks:
            published[block] = 1

    def unpublish(self, blocks: Sequence[int]) -> None:
        """Published blocks can no longer be found; those without a holder become free, the last of them first in line
        for the next allocation."""
        refs, published = self._refs, self.published
        assert all(map(published.__getitem__, blocks)), f"one of the blocks {blocks} is not published"
        for block in blocks:
            published[block] = 0
        idle = [block for block in blocks if not refs[block]]
        self._num_cached -= len(idle)
        self._drop(idle)

    def is_vacant(self, block: int) -> bool:
        """True where the block is free."""
        return not self._held[block] and not self.published[block]

    def is_withdrawn(self, block: int) -> bool:
        """True where the block is out of service."""
        return bool(self._withdrawn[block])

    def take_over(self, block: int, target: int) -> None:
        """A block just allocated gets the holders and the publication of another, which goes out of service."""
        assert self._refs[block] > 0 or self.published[block], f"block {block} is free"
        assert self._refs[target] == 1, f"block {target} is not fresh"
        self._refs[target], self._refs[block] = self._refs[block], 0
        self.published[target], self.published[block] = self.published[block], 0
        self._held[target] = int(self._refs[target] > 0)
        self._held[block] = self._withdrawn[block] = 1
        self._num_active -= 1
        self._num_withdrawn += 1
        self.num_references -= 1

    def withdraw(self, blocks: Collection[int]) -> None:
        """Take free blocks out of service; their pages are no longer used nor wiped. O(num_blocks)."""
        gone = set(blocks)
        assert all(map(self.is_vacant, gone)), "a block is not free"
        self._free = [block for block in self._free if block not in gone]
        for block in gone:
            self._held[block] = self._withdrawn[block] = 1
            self.dirty.pop(block, None)
        self._num_free -= len(gone)
        self._num_withdrawn += len(gone)

    def resize(self, num_blocks: int) -> None:
        """Have blocks 0 .. num_blocks-1 from now on: new ones and withdrawn ones are free; those that end must all be
        withdrawn. O(n)."""
        assert num_blocks >= 1
        fewer = range(num_blocks, self.num_blocks)
        assert all(self._withdrawn[block] for block in fewer), "blocks in use cannot end"
        returned = [block for block in range(min(num_blocks, self.num_blocks)) if self._withdrawn[block]]
        growth = max(num_blocks - self.num_blocks, 0)
        added = range(self.num_blocks, num_blocks)
        for states in (self._held, self.published, self._withdrawn):
            del states[num_blocks:]
            states.extend(bytes(growth))
        del self._refs[num_blocks:]
        self._refs.extend([0] * growth)
        for block in returned:
            self._held[block] = self._withdrawn[block] = 0
            if self._wipes:
                self.dirty[block] = None
        self.num_blocks = num_blocks
        self._num_withdrawn = 0
        self._free = [*reversed(added), *reversed(returned), *self._free]
        self._num_free = len(self._free)

    def reset(self) -> None:
        """Every block is free, whatever it was; those that may hold something await a wipe. O(n)."""
        num_blocks = self.num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._refs = [0] * num_blocks
        self._held, self.published, self._withdrawn = (bytearray(num_blocks) for _ in range(3))
        self._num_free = num_blocks
        self._num_active = self._num_cached = self._num_withdrawn = self.num_references = 0
        self.dirty = dict.fromkeys(range(min(self._highest + 1, num_blocks))) if self._wipes else {}

    def check_block(self, block: int) -> None:
        """The state of one block in O(1). Raises IntegrityError where it contradicts itself."""
        refs, held, published = self._refs[block], self._held[block], self.published[block]
        if refs < 0 or held != (refs > 0 or self._withdrawn[block]) or (published and self._withdrawn[block]):
            raise IntegrityError(
                f"block {block} of the KV cache has {refs} holders, held {held}, published {published}"
            )

    def check(self) -> None:
        """The conservation law in O(1). Raises IntegrityError where blocks were lost or made up."""
        known = self._num_free + self._num_active + self._num_cached + self._num_withdrawn
        if known != self.num_blocks or self._num_free != len(self._free):
            raise IntegrityError(
                f"{self._num_free} free + {self._num_active} active + {self._num_cached} cached + "
                f"{self._num_withdrawn} withdrawn blocks are not the {self.num_blocks} that exist"
            )

    def verify(self) -> None:
        """The conservation law block by block, in O(num_blocks), for tests. Raises IntegrityError."""
        self.check()
        seen = set()
        for block in self._free:
            in_use = self._refs[block] or self._held[block] or self.published[block]
            if block in seen or in_use:
                raise IntegrityError(f"the free list is damaged at block {block}")
            seen.add(block)
        num_held = sum(self._held[block] == 1 and self._refs[block] > 0 for block in range(self.num_blocks))
        cached = sum(self.published[block] and not self._refs[block] for block in range(self.num_blocks))
        counted = (len(seen), num_held, cached) == (self._num_free, self._num_active, self._num_cached)
        if not counted:
            raise IntegrityError(
                f"{len(seen)} blocks listed as free, {num_held} held, {cached} cached: {self.counts()}"
            )

    def _hold(self, blocks: array[int]) -> None:
        if blocks:
            self._highest = max(self._highest, max(blocks))
        refs, held = self._refs, self._held
        for block in blocks:
            refs[block] = held[block] = 1
        self._num_free -= len(blocks)
        self._num_active += len(blocks)
        self.num_references += len(blocks)

    def _drop(self, blocks: list[int]) -> None:
        """The one place where pages' contents stop being anybody's, hence where a wipe of the pages belongs."""
        if self._wipes:
            if self.dirty:
                self.dirty.update(dict.fromkeys(blocks))
            else:  # one that has been emptied has to grow anew
                self.dirty = dict.fromkeys(blocks)
        self._free += blocks
        self._num_free += len(blocks)

    def _find_run(self, count: int) -> int:
        assert count >= 0
        return self._held.find(bytes(count))

    def shortage(self, count: int, num_available: int) -> CapacityError:
        """The error of an allocation of `count` blocks where `num_available` could be had."""
        return self._shortage(f"{count} blocks of the KV cache are needed", num_available)

    def _shortage(self, need: str, num_available: int | None = None) -> CapacityError:
        num_available = self._num_free if num_available is None else num_available
        return CapacityError(
            f"{need}, {num_available} of {self.num_blocks} are free; raise kv_cache_memory_bytes or run fewer or "
            f"shorter sequences (max_num_seqs, max_model_len)",
            retry_after_s=1.0 if self._num_active else None,
        )
