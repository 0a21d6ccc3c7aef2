"""Fixed-size blocks by id: which are free, held, cached or withdrawn, which await a wipe. Owns no sequence and no byte.

    free ── allocate ──> active (≥ 1 holder) ── release ──> free, its page to be wiped
                            │    ^                └── published ──> cached (no holder) ── unpublish ──> free
                         publish └──────────── retain ──────────────────┘

The free blocks are one doubly linked list whose links lie in two arrays indexed by block id, with a sentinel at index
`num_blocks`. So taking the first, giving one back and taking one out of the middle are O(1) and allocate nothing. The
order in which cached blocks leave is a policy's and not kept here.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
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
    """

    __slots__ = (
        "_held", "_highest", "_next", "_num_active", "_num_cached", "_num_free", "_num_withdrawn", "_prev",
        "_published", "_refs", "_wipes", "_withdrawn", "dirty", "num_blocks", "num_references",
    )  # fmt: skip

    def __init__(self, num_blocks: int, *, wipes: bool = False) -> None:
        if num_blocks < 1:
            raise ConfigError(
                f"the KV cache has {num_blocks} blocks; give it room for at least one: raise kv_cache_memory_bytes"
            )
        self.num_blocks = num_blocks
        self._next = array("i", [*range(1, num_blocks + 1), 0])
        self._prev = array("i", [num_blocks, *range(num_blocks)])
        self._refs = array("i", bytes(4 * num_blocks))
        self._held = bytearray(num_blocks)  # 1 where refs > 0: lets a run of free blocks be found at C speed
        self._published = bytearray(num_blocks)
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
        return bool(self._published[block])

    def num_holders(self, block: int) -> int:
        """How many hold the block: 0 is free."""
        return self._refs[block]

    def num_idle(self, blocks: Iterable[int]) -> int:
        """How many of the blocks nobody holds."""
        refs = self._refs
        return sum(1 for block in blocks if not refs[block])

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
        blocks = array("i")
        block = self._next[self.num_blocks]
        for _ in range(count):
            blocks.append(block)
            block = self._next[block]
        self._link(self.num_blocks, block)
        self._hold(blocks)
        return blocks

    def can_allocate_run(self, count: int) -> bool:
        """True where `allocate_run(count)` will succeed."""
        return self._find_run(count) >= 0

    def allocate_run(self, count: int) -> array[int]:
        """Take `count` blocks with consecutive ids, the lowest such run. Returns their ids, `array('i')`.

        Costs a scan of one byte a block. Raises CapacityError, and changes nothing, where no such run is free.
        """
        first = self._find_run(count)
        if first < 0:
            raise self._shortage(f"{count} consecutive blocks of the KV cache are needed")
        blocks = array("i", range(first, first + count))
        for block in blocks:
            self._link(self._prev[block], self._next[block])
        self._hold(blocks)
        return blocks

    def retain(self, blocks: Sequence[int]) -> list[int]:
        """Add one holder to each block. All of them must be held or cached, else IntegrityError and no change.

        Returns those that had none, in order.
        """
        refs = self._refs
        for block in blocks:
            if refs[block] <= 0 and not self._published[block]:
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

    def release(self, blocks: Sequence[int]) -> list[int]:
        """Take one holder from each block; those without any become free, or cached, the last of `blocks` first.

        The next allocation gets them in ascending order of their place in `blocks`. Returns those that lost their last
        holder, the last first. Raises IntegrityError, and changes nothing, where a block would be freed twice.
        """
        dropped = []
        for index in range(len(blocks) - 1, -1, -1):
            block = blocks[index]
            if self._refs[block] <= 0:
                for undone in blocks[index + 1 :]:
                    self._refs[undone] += 1
                raise IntegrityError(f"block {block} of the KV cache was freed twice; nothing was freed this time")
            self._refs[block] -= 1
            if not self._refs[block]:
                dropped.append(block)
        self.num_references -= len(blocks)
        for block in dropped:
            self._held[block] = 0
            self._num_active -= 1
            if self._published[block]:
                self._num_cached += 1
            else:
                self._drop(block)
        return dropped

    def publish(self, block: int) -> None:
        """A held block can be found from now on, and stays cached when its last holder leaves."""
        assert self._refs[block] > 0, f"block {block} is not held"
        self._published[block] = 1

    def unpublish(self, block: int) -> None:
        """A published block can no longer be found; without a holder it becomes free."""
        assert self._published[block], f"block {block} is not published"
        self._published[block] = 0
        if not self._refs[block]:
            self._num_cached -= 1
            self._drop(block)

    def is_vacant(self, block: int) -> bool:
        """True where the block is free."""
        return not self._held[block] and not self._published[block]

    def is_withdrawn(self, block: int) -> bool:
        """True where the block is out of service."""
        return bool(self._withdrawn[block])

    def take_over(self, block: int, target: int) -> None:
        """A block just allocated gets the holders and the publication of another, which goes out of service."""
        assert self._refs[block] > 0 or self._published[block], f"block {block} is free"
        assert self._refs[target] == 1, f"block {target} is not fresh"
        self._refs[target], self._refs[block] = self._refs[block], 0
        self._published[target], self._published[block] = self._published[block], 0
        self._held[target] = int(self._refs[target] > 0)
        self._held[block] = self._withdrawn[block] = 1
        self._num_active -= 1
        self._num_withdrawn += 1
        self.num_references -= 1

    def withdraw(self, block: int) -> None:
        """Take a free block out of service; its page is no longer used nor wiped."""
        assert not self._held[block], f"block {block} is not free"
        assert not self._published[block], f"block {block} is not free"
        self._link(self._prev[block], self._next[block])
        self._held[block] = self._withdrawn[block] = 1
        self._num_free -= 1
        self._num_withdrawn += 1
        self.dirty.pop(block, None)

    def resize(self, num_blocks: int) -> None:
        """Have blocks 0 .. num_blocks-1 from now on: new ones and withdrawn ones are free; those that end must all be
        withdrawn. O(n)."""
        assert num_blocks >= 1
        fewer = range(num_blocks, self.num_blocks)
        assert all(self._withdrawn[block] for block in fewer), "blocks in use cannot end"
        free = []
        block = self._next[self.num_blocks]
        while block != self.num_blocks:
            free.append(block)
            block = self._next[block]
        returned = [block for block in range(min(num_blocks, self.num_blocks)) if self._withdrawn[block]]
        growth = max(num_blocks - self.num_blocks, 0)
        added = range(self.num_blocks, num_blocks)
        for states in (self._held, self._published, self._withdrawn):
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
        self._next = array("i", bytes(4 * (num_blocks + 1)))
        self._prev = array("i", bytes(4 * (num_blocks + 1)))
        self._num_free = len(free) + len(returned) + len(added)
        before = num_blocks
        for block in (*free, *returned, *added):
            self._link(before, block)
            before = block
        self._link(before, num_blocks)

    def reset(self) -> None:
        """Every block is free, whatever it was; those that may hold something await a wipe. O(n)."""
        num_blocks = self.num_blocks
        self._next = array("i", [*range(1, num_blocks + 1), 0])
        self._prev = array("i", [num_blocks, *range(num_blocks)])
        self._refs = array("i", bytes(4 * num_blocks))
        self._held, self._published, self._withdrawn = (bytearray(num_blocks) for _ in range(3))
        self._num_free = num_blocks
        self._num_active = self._num_cached = self._num_withdrawn = self.num_references = 0
        self.dirty = dict.fromkeys(range(min(self._highest + 1, num_blocks))) if self._wipes else {}

    def check_block(self, block: int) -> None:
        """The state of one block in O(1). Raises IntegrityError where it contradicts itself."""
        refs, held, published = self._refs[block], self._held[block], self._published[block]
        if refs < 0 or held != (refs > 0 or self._withdrawn[block]) or (published and self._withdrawn[block]):
            raise IntegrityError(
                f"block {block} of the KV cache has {refs} holders, held {held}, published {published}"
            )

    def check(self) -> None:
        """The conservation law in O(1). Raises IntegrityError where blocks were lost or made up."""
        known = self._num_free + self._num_active + self._num_cached + self._num_withdrawn
        if known != self.num_blocks:
            raise IntegrityError(
                f"{self._num_free} free + {self._num_active} active + {self._num_cached} cached + "
                f"{self._num_withdrawn} withdrawn blocks are not the {self.num_blocks} that exist"
            )

    def verify(self) -> None:
        """The conservation law block by block, in O(num_blocks), for tests. Raises IntegrityError."""
        self.check()
        seen = set()
        before, block = self.num_blocks, self._next[self.num_blocks]
        while block != self.num_blocks:
            in_use = self._refs[block] or self._held[block] or self._published[block]
            if block in seen or in_use or self._prev[block] != before:
                raise IntegrityError(f"the free list is damaged at block {block}")
            seen.add(block)
            before, block = block, self._next[block]
        num_held = sum(self._held[block] == 1 and self._refs[block] > 0 for block in range(self.num_blocks))
        cached = sum(self._published[block] and not self._refs[block] for block in range(self.num_blocks))
        counted = (len(seen), num_held, cached) == (self._num_free, self._num_active, self._num_cached)
        if not counted or self._prev[self.num_blocks] != before:
            raise IntegrityError(
                f"{len(seen)} blocks listed as free, {num_held} held, {cached} cached: {self.counts()}"
            )

    def _hold(self, blocks: array[int]) -> None:
        if blocks:
            self._highest = max(self._highest, max(blocks))
        for block in blocks:
            self._refs[block] = 1
            self._held[block] = 1
        self._num_free -= len(blocks)
        self._num_active += len(blocks)
        self.num_references += len(blocks)

    def _drop(self, block: int) -> None:
        """The one place where a page's contents stop being anybody's, hence where a wipe of the page belongs."""
        if self._wipes:
            self.dirty[block] = None
        first = self._next[self.num_blocks]
        self._link(self.num_blocks, block)
        self._link(block, first)
        self._num_free += 1

    def _link(self, before: int, after: int) -> None:
        self._next[before] = after
        self._prev[after] = before

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
