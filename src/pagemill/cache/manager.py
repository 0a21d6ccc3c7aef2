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

Paged with a `SharingConfig` is the prefix cache: `open` finds what is there of the tokens and takes only the rest,
`commit` publishes each block that fills, `close` publishes the tail and leaves all of it until room is short.

    blocks of a table   | hit, shared ... | copied tail, own ... own | own, not full |
                        |  published, never written | published when full
"""

from __future__ import annotations

from array import array
from typing import Literal, get_args

from pagemill.base.errors import CapacityError, ConfigError, IntegrityError
from pagemill.base.params import DEFAULT_CACHE_OPTIONS, CacheOptions, Retain
from pagemill.base.transfer import NO_MOVES, Moves
from pagemill.cache.block import Node
from pagemill.cache.entry import CacheStats, SharingConfig
from pagemill.cache.keys import TOKEN_BYTES
from pagemill.cache.pool import BlockPool
from pagemill.cache.receipt import Lookup
from pagemill.cache.resizing import check_size, relocate, vacate
from pagemill.cache.sequences import NEVER, SequenceBlocks, verify_sequences
from pagemill.cache.sharing import SharedBlocks

CacheMode = Literal["paged", "contiguous", "none"]


class CacheManager:
    """Block tables of all open sequences over one pool. Mutated by `open`, `resize`, `commit` and `close`.

    block_size: token positions in a block. sharing: how a paged cache shares blocks; None leaves every sequence alone,
    as do the other modes. shared: what is published, None without sharing. Every operation that raises has changed
    nothing; an unknown or twice opened sequence is a mistake of ours and an AssertionError. Raises ConfigError for
    sizes out of range.
    """

    __slots__ = (
        "_num_asked", "_num_hit", "_num_owned", "_num_positions", "_pool", "_sequences", "_targets", "block_size",
        "mode", "shared",
    )  # fmt: skip

    def __init__(
        self, num_blocks: int, block_size: int, mode: CacheMode = "paged", sharing: SharingConfig | None = None
    ) -> None:
        if block_size < 1:
            raise ConfigError(f"block_size is {block_size}; give at least 1 token position")
        if mode not in get_args(CacheMode):
            raise ConfigError(f"unknown kv_cache mode {mode!r}; choose one of {', '.join(get_args(CacheMode))}")
        self.block_size = block_size
        self.mode: CacheMode = mode
        sharing = sharing if mode == "paged" else None
        self._pool = BlockPool(num_blocks, wipes=sharing is not None)
        self.shared = None if sharing is None else SharedBlocks(self._pool, block_size, sharing)
        self._sequences: dict[int, SequenceBlocks] = {}
        self._num_positions = 0
        self._num_owned = 0  # entries of all tables: a block that three share counts three times
        self._targets: dict[int, int] = {}  # while a smaller size is made ready: block -> where it goes
        self._num_asked = 0
        self._num_hit = 0

    @property
    def num_blocks(self) -> int:
        """Blocks that exist."""
        return self._pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody holds and nothing is kept in."""
        return self._pool.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` positions."""
        return -(-num_tokens // self.block_size)

    def blocks_to_open(self, num_tokens: int, reserve: int) -> int:
        """Blocks that `open` will take for a sequence of `num_tokens` known tokens, `reserve` at the most."""
        if self.mode == "paged":
            return self.blocks_for(num_tokens)
        return self.blocks_for(reserve) if self.mode == "contiguous" else 0

    def can_open(
        self,
        num_tokens: int,
        reserve: int,
        spare: int = 0,
        tokens: array[int] | None = None,
        options: CacheOptions = DEFAULT_CACHE_OPTIONS,
    ) -> bool:
        """True where `open` will succeed and leave at least `spare` blocks to be had."""
        if self.shared is not None:
            if tokens is None:
                return self.blocks_for(num_tokens) + spare <= self._pool.num_free + self._pool.num_cached
            entry = self.shared.entry(options, tokens, num_tokens)
            return entry.num_new <= entry.num_spare and entry.num_new + spare <= entry.num_room
        count = self.blocks_to_open(num_tokens, reserve)
        if count + spare > self._pool.num_free:
            return False
        return self.mode != "contiguous" or self._pool.can_allocate_run(count)

    def open(
        self,
        seq_id: int,
        num_tokens: int,
        reserve: int,
        tokens: array[int] | None = None,
        options: CacheOptions = DEFAULT_CACHE_OPTIONS,
    ) -> Lookup:
        """Begin a sequence of `num_tokens` known tokens, `reserve` at the most.

        tokens: the caller's `array('i')`, kept and read as it grows; without it nothing is shared. Afterwards the
        sequence's history is `num_tokens` (0 in mode none, which takes blocks only for a step), and what was hit is
        committed: at least the last known token is left to be computed. Raises CapacityError where blocks are short.
        """
        assert seq_id not in self._sequences, f"sequence {seq_id} is open already"
        assert 0 <= num_tokens <= reserve, (num_tokens, reserve)
        if self.shared is not None:
            return self._open_shared(self.shared, seq_id, num_tokens, tokens, options)
        count = self.blocks_to_open(num_tokens, reserve)
        table = self._pool.allocate_run(count) if self.mode == "contiguous" else self._pool.allocate(count)
        history = 0 if self.mode == "none" else num_tokens
        self._sequences[seq_id] = SequenceBlocks(table, 0, history)
        self._num_owned += len(table)
        self._num_positions += history
        return Lookup(0)

    def _open_shared(
        self, shared: SharedBlocks, seq_id: int, num_tokens: int, tokens: array[int] | None, options: CacheOptions
    ) -> Lookup:
        bypass = tokens is None or options.bypass
        entry = shared.entry(
            CacheOptions(options.tenant, options.salt, options.public, True) if tokens is None else options,
            array("i") if tokens is None else tokens,
            num_tokens,
        )
        table = shared.enter(entry)
        sequence = SequenceBlocks(table, entry.num_hit, num_tokens, account=entry.account, node=entry.node)
        if not bypass:
            sequence.tokens, sequence.retain = tokens, options.retain
            sequence.missing, sequence.first_missing = entry.missing, len(entry.shared)
            sequence.publish_at = (len(entry.shared) + 1) * self.block_size
            for node in shared.tree.chain(entry.node) if options.retain else ():
                self._retain(shared, sequence, node)
        self._sequences[seq_id] = sequence
        self._num_owned += len(table)
        self._num_positions += num_tokens
        self._num_asked += entry.lookup.num_asked
        self._num_hit += entry.num_hit
        return entry.lookup

    def can_resize(self, seq_id: int, num_tokens: int) -> bool:
        """True where `resize` will succeed."""
        sequence = self._sequences[seq_id]
        growth = -(-num_tokens // self.block_size) - len(sequence.table)
        if growth > 0:
            return self.mode != "contiguous" and growth <= self._available(sequence)
        if num_tokens >= sequence.committed:
            return True
        return not self._must_copy(sequence, num_tokens) or self._available(sequence) > 0

    def resize(self, seq_id: int, num_tokens: int) -> None:
        """Set a sequence's history to `num_tokens`: growth for the next tokens, rollback and truncation alike.

        Growth takes whole blocks, shrinking frees whole blocks and un-commits what lies beyond (contiguous keeps its
        reservation). A rollback into a block that others may read goes on in a copy of it. Raises CapacityError where
        blocks are short.
        """
        sequence = self._sequences[seq_id]
        assert num_tokens >= 0
        table = sequence.table
        count = -(-num_tokens // self.block_size)
        if count > len(table):
            self._grow(sequence, num_tokens, count)
        elif num_tokens < sequence.history:
            sequence.missing = ()
            if sequence.node is not None and num_tokens < sequence.committed:
                self._roll_back(sequence, num_tokens)
            if count < len(table) and self.mode != "contiguous":
                self._release(table[count:])
                self._num_owned -= len(table) - count
                del table[count:]
        self._num_positions += num_tokens - sequence.history
        sequence.history = num_tokens
        if num_tokens < sequence.committed:
            sequence.committed = num_tokens

    def _grow(self, sequence: SequenceBlocks, num_tokens: int, count: int) -> None:
        table = sequence.table
        if self.mode == "contiguous":
            raise CapacityError(
                f"the sequence needs {num_tokens} positions and {len(table) * self.block_size} were reserved; "
                f"raise max_model_len or set kv_cache to paged"
            )
        if self.shared is not None:
            assert sequence.account is not None
            grown = self.shared.allocate(sequence.account, count - len(table))
        else:
            grown = self._pool.allocate(count - len(table))
        table.extend(grown)
        self._num_owned += len(grown)

    def commit(self, seq_id: int, num_tokens: int) -> None:
        """Keys and values of positions 0 .. num_tokens-1 are written and verified; blocks that are full are published.

        In mode none they served their step: the scratch blocks go back and nothing stays computed.
        """
        sequence = self._sequences[seq_id]
        assert sequence.committed <= num_tokens <= sequence.history, (seq_id, num_tokens, sequence)
        if self.mode == "none":
            self.resize(seq_id, 0)
            return
        sequence.committed = num_tokens
        if num_tokens >= sequence.publish_at:
            assert self.shared is not None
            self._publish(self.shared, sequence)

    def publish_tail(self, seq_id: int) -> None:
        """Let what a running sequence has committed be found to its last token, as its siblings wish. What it writes
        behind that is its own; whoever hits the tail copies it."""
        sequence = self._sequences[seq_id]
        shared, node, tokens = self.shared, sequence.node, sequence.tokens
        if shared is None or node is None or tokens is None or not node.alive:
            return
        start = sequence.publish_at - self.block_size
        if sequence.committed <= start or shared.is_copying(sequence.table[start // self.block_size]):
            return
        data = tokens[start : sequence.committed].tobytes()
        if shared.tree.extended_by(node, data) is not None:
            return
        self._take_back_tail(shared, sequence)
        sequence.tail = shared.publish(
            node, sequence.table[start // self.block_size], data, None, self._wish(sequence, start, sequence.committed)
        )

    def close(self, seq_id: int) -> None:
        """End a sequence in whatever state. What it has committed stays to be found, the rest of its blocks is free."""
        sequence = self._sequences[seq_id]
        if sequence.tokens is not None:
            self.publish_tail(seq_id)
        del self._sequences[seq_id]
        self._release(sequence.table)
        self._num_owned -= len(sequence.table)
        self._num_positions -= sequence.history

    def _publish(self, shared: SharedBlocks, sequence: SequenceBlocks) -> None:
        """Publish every full block that is not yet. One that another sequence has published is exchanged for that."""
        size, tokens, table = self.block_size, sequence.tokens, sequence.table
        assert tokens is not None
        while sequence.publish_at <= sequence.committed:
            end, node = sequence.publish_at, sequence.node
            assert node is not None
            if not node.alive:  # its beginning was purged: nothing can be found behind it
                sequence.tokens, sequence.publish_at = None, NEVER
                return
            index = end // size - 1
            data = tokens[end - size : end].tobytes()
            self._take_back_tail(shared, sequence)
            there = node.children.get(data)
            if there is None:
                missing = index - sequence.first_missing
                key = sequence.missing[missing] if 0 <= missing < len(sequence.missing) else None
                there = shared.publish(node, table[index], data, key, self._wish(sequence, end - size, end))
            else:
                shared.hold([there.block])
                shared.release([table[index]])
                table[index] = there.block
                self._retain(shared, sequence, there)
            sequence.node = there
            sequence.publish_at = end + size

    def _roll_back(self, sequence: SequenceBlocks, num_tokens: int) -> None:
        """Leave the published blocks that reach beyond `num_tokens`; the one it lies within becomes its own."""
        shared, size = self.shared, self.block_size
        assert shared is not None
        copies = self._must_copy(sequence, num_tokens)
        if copies and not self._available(sequence):
            raise CapacityError("a rollback needs one block of the KV cache and none is free", retry_after_s=1.0)
        if (
            sequence.tail is not None
            and num_tokens < sequence.publish_at - size + len(sequence.tail.tokens) // TOKEN_BYTES
        ):
            self._take_back_tail(shared, sequence)
        whole, node = num_tokens // size, sequence.node
        while node is not None and node.depth >= whole and node.parent is not None:
            last, node = node, node.parent
            if last.depth == whole and num_tokens % size and not copies and last.alive:
                shared.discard(last)
        sequence.node = node
        if copies:
            assert sequence.account is not None
            source = sequence.table[whole]
            target = shared.copy_on_write(sequence.account, source, num_tokens % size)
            sequence.table[whole] = target
            shared.release([source])
        if sequence.tokens is not None:
            sequence.publish_at = (whole + 1) * size

    def _must_copy(self, sequence: SequenceBlocks, num_tokens: int) -> bool:
        """True where the block that `num_tokens` ends in is published and others hold or follow it."""
        node, whole = sequence.node, num_tokens // self.block_size
        if node is None or node.depth < whole or not num_tokens % self.block_size:
            return False
        return node.depth > whole or bool(node.children) or self._pool.num_holders(sequence.table[whole]) > 1

    def _take_back_tail(self, shared: SharedBlocks, sequence: SequenceBlocks) -> None:
        if sequence.tail is not None:
            if sequence.tail.alive:
                shared.discard(sequence.tail)
            sequence.tail = None

    def _wish(self, sequence: SequenceBlocks, start: int, end: int) -> Retain | None:
        """The highest priority that the request asked for any of these positions."""
        wishes = [each for each in sequence.retain if each.start < end and start < each.end]
        return max(wishes, key=lambda each: each.priority, default=None)

    def _retain(self, shared: SharedBlocks, sequence: SequenceBlocks, node: Node) -> None:
        start = node.depth * self.block_size
        wish = self._wish(sequence, start, start + self.block_size) if sequence.retain else None
        if wish is not None:
            shared.retain(node, wish)

    def is_capped(self, seq_id: int, num_tokens: int) -> bool:
        """True where a sequence cannot grow to `num_tokens` for its tenant's cap, whatever others give up."""
        sequence = self._sequences[seq_id]
        growth = max(self.blocks_for(num_tokens) - len(sequence.table), 1)  # or the copy of a rollback
        account = sequence.account
        return account is not None and account.cap is not None and growth > account.cap - account.used + account.cached

    def same_account(self, seq_id: int, other: int) -> bool:
        """True where both sequences' blocks are counted for one tenant."""
        return self._sequences[seq_id].account is self._sequences[other].account

    def _available(self, sequence: SequenceBlocks) -> int:
        """Blocks that the sequence could take now."""
        if self.shared is None:
            return self._pool.num_free
        assert sequence.account is not None
        return self.shared.available(sequence.account)

    def _release(self, blocks: array[int]) -> None:
        if self.shared is None:
            self._pool.release(blocks)
        else:
            self.shared.release(blocks)

    def cap_error(self, num_tokens: int, options: CacheOptions) -> CapacityError | None:
        """The error of a text that its tenant's cap can never hold, None where it can."""
        return None if self.shared is None else self.shared.cap_error(self.blocks_for(num_tokens), options)

    def pin_error(self, count: int) -> CapacityError | None:
        """The error of `count` blocks that are there but for pins, None where pins are not what stands in the way."""
        pinned = 0 if self.shared is None else self.shared.leases.num_blocks
        if not pinned or count > self.num_blocks:
            return None
        return CapacityError(
            f"{count:,} blocks of the KV cache are needed, and pins hold {pinned:,} of {self.num_blocks:,}; unpin "
            f"some, try again when they end, or raise kv_cache_memory_bytes",
            retry_after_s=1.0,
        )

    def vacate(self, num_blocks: int) -> Moves:
        """Make ready for `num_blocks` blocks, sequences alive. Once these moves are made, `relocate` makes sequences
        follow them, and `set_num_blocks` ends it; with the present number, that gives it up instead.

        Raises CapacityError where sequences and pins use more, ConfigError where floors do; nothing is changed then.
        """
        check_size(self._pool, self.shared, num_blocks, self.mode)
        self._targets, moves = vacate(self._pool, self.shared, num_blocks, self.block_size)
        return moves

    def relocate(self) -> None:
        """What `vacate` asked for has been copied: tables, tree and leases follow."""
        relocate(self._pool, self.shared, (sequence.table for sequence in self._sequences.values()), self._targets)
        self._targets = {}

    def set_num_blocks(self, num_blocks: int) -> None:
        """Have so many blocks from now on; those that end are vacated."""
        self._pool.release(list(self._targets.values()))  # of a vacation that was given up
        self._targets = {}
        self._pool.resize(num_blocks)
        if self.shared is not None:
            self.shared.set_num_blocks(num_blocks)

    def moves(self) -> Moves:
        """Wipes and copies that the data plane makes before it computes; the same until `moved`."""
        return NO_MOVES if self.shared is None else self.shared.moves()

    def moved(self, moves: Moves) -> None:
        """The data plane has made these moves."""
        if self.shared is not None:
            self.shared.moved(moves)

    def advance(self, now_s: float) -> None:
        """Move the cache's clock: leases and priorities end with it."""
        if self.shared is not None:
            self.shared.advance(now_s)

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
        pool, shared = self._pool.counts(), self.shared
        return CacheStats(
            num_blocks=pool.num_blocks,
            num_free_blocks=pool.num_free,
            num_active_blocks=pool.num_active,
            num_sequences=len(self._sequences),
            num_positions=self._num_positions,
            num_unused_positions=self._num_owned * self.block_size - self._num_positions,
            num_leaked_blocks=self._pool.num_references - self._num_owned - (shared.num_references if shared else 0),
            num_cached_blocks=pool.num_cached,
            num_held_blocks=pool.num_held,
            num_pinned_blocks=shared.leases.num_blocks if shared else 0,
            num_asked_tokens=self._num_asked,
            num_hit_tokens=self._num_hit,
            num_evicted_blocks=shared.num_evicted if shared else 0,
        )

    def check(self) -> None:
        """Conservation in O(1): every block is free, cached or owned. Raises IntegrityError."""
        self._pool.check()
        stats = self.stats()
        if stats.num_leaked_blocks or stats.num_unused_positions < 0:
            raise IntegrityError(f"the KV cache lost count of its blocks: {stats}")

    def verify(self) -> None:
        """Every invariant of lengths and ownership, in O(num_blocks), for tests. Raises IntegrityError."""
        self._pool.verify()
        self.check()
        if self.shared is not None:
            self.shared.verify()
        counted = verify_sequences(self._sequences, self._pool, self.shared, self.mode, self.block_size)
        if counted != (self._num_owned, self._num_positions):
            raise IntegrityError(f"{counted} blocks and positions in tables: {self.stats()}")
