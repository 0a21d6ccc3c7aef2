"""Fixed-size blocks by id: which are free, which are held, and by how many holders. Owns no sequence and no byte.

The free blocks are one doubly linked list whose links lie in two arrays indexed by block id, with a sentinel at index
`num_blocks`. So taking the first, giving one back and taking one out of the middle are O(1) and allocate nothing.
Later, unpinned cached blocks join the far end of the same list, which is then the eviction order as well.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from pagemill.base.errors import CapacityError, ConfigError, IntegrityError


@dataclass(frozen=True, slots=True)
class PoolCounts:
    """Blocks by state. free + active = total."""

    num_blocks: int
    num_free: int
    num_active: int


class BlockPool:
    """Allocates blocks 0 .. num_blocks-1. Mutated by `allocate`, `allocate_run`, `retain` and `release`.

    Every operation either happens whole or changes nothing. Raises ConfigError for a pool without blocks.
    """

    __slots__ = ("_held", "_next", "_num_active", "_num_free", "_prev", "_refs", "num_blocks")

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ConfigError(
                f"the KV cache has {num_blocks} blocks; give it room for at least one: raise kv_cache_memory_bytes"
            )
        self.num_blocks = num_blocks
        self._next = array("i", [*range(1, num_blocks + 1), 0])
        self._prev = array("i", [num_blocks, *range(num_blocks)])
        self._refs = array("i", bytes(4 * num_blocks))
        self._held = bytearray(num_blocks)  # 1 where refs > 0: lets a run of free blocks be found at C speed
        self._num_free = num_blocks
        self._num_active = 0

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now."""
        return self._num_free

    @property
    def num_active(self) -> int:
        """Blocks with at least one holder."""
        return self._num_active

    def counts(self) -> PoolCounts:
        """Blocks by state, now."""
        return PoolCounts(self.num_blocks, self._num_free, self._num_active)

    def num_holders(self, block: int) -> int:
        """How many hold the block: 0 is free."""
        return self._refs[block]

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

    def retain(self, blocks: Sequence[int]) -> None:
        """Add one holder to each block. All of them must be held already, else IntegrityError and no change."""
        for block in blocks:
            if self._refs[block] <= 0:
                raise IntegrityError(f"block {block} of the KV cache is free and cannot be shared")
        for block in blocks:
            self._refs[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Take one holder from each block; those without any become free, the last of `blocks` first.

        The next allocation gets them in ascending order of their place in `blocks`. Raises IntegrityError, and
        changes nothing, where a block would be freed twice.
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
        for block in dropped:
            self._drop(block)

    def check(self) -> None:
        """The conservation law in O(1). Raises IntegrityError where blocks were lost or made up."""
        if self._num_free + self._num_active != self.num_blocks:
            raise IntegrityError(
                f"{self._num_free} free + {self._num_active} active blocks are not the {self.num_blocks} that exist"
            )

    def verify(self) -> None:
        """The conservation law block by block, in O(num_blocks), for tests. Raises IntegrityError."""
        self.check()
        seen = set()
        before, block = self.num_blocks, self._next[self.num_blocks]
        while block != self.num_blocks:
            if block in seen or self._refs[block] or self._held[block] or self._prev[block] != before:
                raise IntegrityError(f"the free list is damaged at block {block}")
            seen.add(block)
            before, block = block, self._next[block]
        num_held = sum(self._held[block] == 1 and self._refs[block] > 0 for block in range(self.num_blocks))
        if len(seen) != self._num_free or num_held != self._num_active or self._prev[self.num_blocks] != before:
            raise IntegrityError(f"{len(seen)} blocks listed as free, {num_held} held: {self.counts()}")

    def _hold(self, blocks: array[int]) -> None:
        for block in blocks:
            self._refs[block] = 1
            self._held[block] = 1
        self._num_free -= len(blocks)
        self._num_active += len(blocks)

    def _drop(self, block: int) -> None:
        """The one place where a page's contents stop being anybody's, hence where a wipe of the page belongs."""
        self._held[block] = 0
        self._num_active -= 1
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

    def _shortage(self, need: str) -> CapacityError:
        return CapacityError(
            f"{need}, {self._num_free} of {self.num_blocks} are free; raise kv_cache_memory_bytes or run fewer or "
            f"shorter sequences (max_num_seqs, max_model_len)",
            retry_after_s=1.0 if self._num_active else None,
        )
