"""Which sequence owns which blocks, in which order, and how much of them is written. Owns ids and counts, no bytes.

    positions of a sequence   0 ........ committed ........ history ........ capacity
                              |  computed |  granted to the  |  rest of the  |
                              |  earlier  |  next steps      |  last block   |

The three modes differ here and nowhere else in the control plane; the executor sees a block table in each.

| mode         | open                           | resize                      | commit                            |
|--------------|--------------------------------|-----------------------------|-----------------------------------|
| `paged`      | takes the known tokens' blocks | takes or frees whole blocks | keeps them                        |
| `contiguous` | takes `reserve`'s, consecutive | stays within them           | keeps them                        |
| `none`       | takes nothing                  | takes scratch blocks        | returns all, nothing is committed |
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Literal, get_args

from pagemill.base.errors import CapacityError, ConfigError, IntegrityError
from pagemill.cache.pool import BlockPool

CacheMode = Literal["paged", "contiguous", "none"]


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Use of the cache, in blocks and token positions.

    num_positions: positions granted to sequences. num_unused_positions: those of active blocks that are not, the
    waste that paging keeps below one block a sequence. num_leaked_blocks: active blocks that no sequence owns (0).
    """

    num_blocks: int
    num_free_blocks: int
    num_active_blocks: int
    num_sequences: int
    num_positions: int
    num_unused_positions: int
    num_leaked_blocks: int


@dataclass(slots=True)
class _SequenceBlocks:
    """Blocks and lengths of one sequence. Mutated by CacheManager alone."""

    table: array[int] = field(default_factory=lambda: array("i"))
    committed: int = 0
    history: int = 0


class CacheManager:
    """Block tables of all open sequences over one pool. Mutated by `open`, `resize`, `commit` and `close`.

    block_size: token positions in a block. Every operation that raises has changed nothing; an unknown or twice opened
    sequence is a mistake of ours and an AssertionError. Raises ConfigError for sizes out of range.
    """

    __slots__ = ("_num_owned", "_num_positions", "_pool", "_sequences", "block_size", "mode")

    def __init__(self, num_blocks: int, block_size: int, mode: CacheMode = "paged") -> None:
        if block_size < 1:
            raise ConfigError(f"block_size is {block_size}; give at least 1 token position")
        if mode not in get_args(CacheMode):
            raise ConfigError(f"unknown kv_cache mode {mode!r}; choose one of {', '.join(get_args(CacheMode))}")
        self.block_size = block_size
        self.mode: CacheMode = mode
        self._pool = BlockPool(num_blocks)
        self._sequences: dict[int, _SequenceBlocks] = {}
        self._num_positions = 0
        self._num_owned = 0

    @property
    def num_blocks(self) -> int:
        """Blocks that exist."""
        return self._pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody holds."""
        return self._pool.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` positions."""
        return -(-num_tokens // self.block_size)

    def blocks_to_open(self, num_tokens: int, reserve: int) -> int:
        """Blocks that `open` will take for a sequence of `num_tokens` known tokens, `reserve` at the most."""
        if self.mode == "paged":
            return self.blocks_for(num_tokens)
        return self.blocks_for(reserve) if self.mode == "contiguous" else 0

    def can_open(self, num_tokens: int, reserve: int, spare: int = 0) -> bool:
        """True where `open` will succeed and leave at least `spare` blocks free."""
        count = self.blocks_to_open(num_tokens, reserve)
        if count + spare > self._pool.num_free:
            return False
        return self.mode != "contiguous" or self._pool.can_allocate_run(count)

    def open(self, seq_id: int, num_tokens: int, reserve: int) -> None:
        """Begin a sequence of `num_tokens` known tokens, none of them computed, `reserve` at the most.

        Afterwards its history is `num_tokens` (0 in mode none, which takes blocks only for a step). Raises
        CapacityError where blocks are short.
        """
        assert seq_id not in self._sequences, f"sequence {seq_id} is open already"
        assert 0 <= num_tokens <= reserve, (num_tokens, reserve)
        count = self.blocks_to_open(num_tokens, reserve)
        table = self._pool.allocate_run(count) if self.mode == "contiguous" else self._pool.allocate(count)
        history = 0 if self.mode == "none" else num_tokens
        self._sequences[seq_id] = _SequenceBlocks(table, 0, history)
        self._num_owned += len(table)
        self._num_positions += history

    def can_resize(self, seq_id: int, num_tokens: int) -> bool:
        """True where `resize` will succeed."""
        growth = self.blocks_for(num_tokens) - len(self._sequences[seq_id].table)
        return growth <= 0 or (self.mode != "contiguous" and growth <= self._pool.num_free)

    def resize(self, seq_id: int, num_tokens: int) -> None:
        """Set a sequence's history to `num_tokens`: growth for the next tokens, rollback and truncation alike.

        Growth takes whole blocks, shrinking frees whole blocks and un-commits what lies beyond (contiguous keeps its
        reservation). Raises CapacityError where blocks are short.
        """
        sequence = self._sequences[seq_id]
        assert num_tokens >= 0
        table = sequence.table
        count = -(-num_tokens // self.block_size)
        if count > len(table):
            if self.mode == "contiguous":
                raise CapacityError(
                    f"the sequence needs {num_tokens} positions and {len(table) * self.block_size} were reserved; "
                    f"raise max_model_len or set kv_cache to paged"
                )
            grown = self._pool.allocate(count - len(table))
            table.extend(grown)
            self._num_owned += len(grown)
        elif count < len(table) and self.mode != "contiguous":
            self._pool.release(table[count:])
            self._num_owned -= len(table) - count
            del table[count:]
        self._num_positions += num_tokens - sequence.history
        sequence.history = num_tokens
        if num_tokens < sequence.committed:
            sequence.committed = num_tokens

    def commit(self, seq_id: int, num_tokens: int) -> None:
        """Keys and values of positions 0 .. num_tokens-1 are written and verified.

        In mode none they served their step: the scratch blocks go back and nothing stays computed.
        """
        sequence = self._sequences[seq_id]
        assert sequence.committed <= num_tokens <= sequence.history, (seq_id, num_tokens, sequence)
        if self.mode == "none":
            self.resize(seq_id, 0)
        else:
            sequence.committed = num_tokens

    def close(self, seq_id: int) -> None:
        """End a sequence in whatever state; its blocks go back."""
        sequence = self._sequences.pop(seq_id)
        self._pool.release(sequence.table)
        self._num_owned -= len(sequence.table)
        self._num_positions -= sequence.history

    def block_table(self, seq_id: int) -> array[int]:
        """The sequence's block ids in order, `array('i')` owned by the cache: to be read, not written nor kept."""
        return self._sequences[seq_id].table

    def num_committed(self, seq_id: int) -> int:
        """Positions whose keys and values are in the cache."""
        return self._sequences[seq_id].committed

    def num_history(self, seq_id: int) -> int:
        """Positions granted to the sequence."""
        return self._sequences[seq_id].history

    def stats(self) -> CacheStats:
        """Use of the cache, now, in O(1)."""
        pool = self._pool.counts()
        return CacheStats(
            num_blocks=pool.num_blocks,
            num_free_blocks=pool.num_free,
            num_active_blocks=pool.num_active,
            num_sequences=len(self._sequences),
            num_positions=self._num_positions,
            num_unused_positions=pool.num_active * self.block_size - self._num_positions,
            num_leaked_blocks=pool.num_active - self._num_owned,
        )

    def check(self) -> None:
        """Conservation in O(1): every block is free or owned. Raises IntegrityError."""
        self._pool.check()
        stats = self.stats()
        if stats.num_leaked_blocks or stats.num_unused_positions < 0:
            raise IntegrityError(f"the KV cache lost count of its blocks: {stats}")

    def verify(self) -> None:
        """Every invariant of lengths and ownership, in O(num_blocks), for tests. Raises IntegrityError."""
        self._pool.verify()
        self.check()
        owned: set[int] = set()
        num_positions = 0
        for seq_id, sequence in self._sequences.items():
            capacity = len(sequence.table) * self.block_size
            ordered = 0 <= sequence.committed <= sequence.history <= capacity
            wasteful = self.mode != "contiguous" and capacity - sequence.history >= self.block_size
            if not ordered or wasteful or not owned.isdisjoint(sequence.table):
                raise IntegrityError(f"sequence {seq_id} breaks its lengths or shares blocks: {sequence}")
            if any(self._pool.num_holders(block) != 1 for block in sequence.table):
                raise IntegrityError(f"sequence {seq_id} owns a block that is free or counted twice: {sequence}")
            owned.update(sequence.table)
            num_positions += sequence.history
        if len(owned) != self._num_owned or num_positions != self._num_positions:
            raise IntegrityError(f"{len(owned)} blocks, {num_positions} positions in tables: {self.stats()}")
