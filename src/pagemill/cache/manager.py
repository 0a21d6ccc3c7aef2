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

import logging
from array import array
from collections.abc import Collection
from typing import Final, Literal, get_args

from pagemill.base.errors import CapacityError, ConfigError, IntegrityError
from pagemill.base.kv_spec import KVSpec
from pagemill.base.params import DEFAULT_CACHE_OPTIONS, CacheOptions
from pagemill.base.transfer import NO_MOVES, Moves
from pagemill.cache.curve import ReuseCurve
from pagemill.cache.entry import CacheStats, SharingConfig
from pagemill.cache.pool import BlockPool
from pagemill.cache.publishing import Publisher
from pagemill.cache.receipt import Lookup
from pagemill.cache.resizing import check_size, pin_error, relocate, vacate
from pagemill.cache.sequences import SequenceBlocks, verify_sequences
from pagemill.cache.sharing import SharedBlocks
from pagemill.cache.tenancy import Tenancy, quota_blocks
from pagemill.cache.windows import Windows

CacheMode = Literal["paged", "contiguous", "none"]
_LOG: Final = logging.getLogger(__name__)


class CacheManager:
    """Block tables of all open sequences over one pool. Mutated by `open`, `resize`, `commit` and `close`.

    block_size: token positions in a block. sharing: how a paged cache shares blocks; None leaves every sequence alone,
    as do the other modes. kv_spec: what blocks take, to be told in bytes; None where that is not known. shared: what is
    published, None without sharing. curve: what caches of other sizes would have hit of the texts looked up, nothing
    without sharing. Every operation that raises has changed nothing; an unknown or twice opened sequence is a mistake
    of ours and an AssertionError. Raises ConfigError for sizes out of range.
    """

    __slots__ = (
        "_damage", "_doubt", "_num_owned", "_num_positions", "_num_quarantined", "_num_rebuilds",
        "_pool", "_publisher", "_sequences", "_targets", "block_size", "curve", "kv_spec", "mode", "shared",
    )  # fmt: skip

    def __init__(
        self, num_blocks: int, block_size: int, mode: CacheMode = "paged",
        sharing: SharingConfig | None = None, kv_spec: KVSpec | None = None,
    ) -> None:  # fmt: skip
        if block_size < 1:
            raise ConfigError(f"block_size is {block_size}; give at least 1 token position")
        if mode not in get_args(CacheMode):
            raise ConfigError(f"unknown kv_cache mode {mode!r}; choose one of {', '.join(get_args(CacheMode))}")
        self.block_size = block_size
        self.mode: CacheMode = mode
        self.kv_spec = kv_spec
        sharing = sharing if mode == "paged" else None
        self._pool = BlockPool(num_blocks, wipes=sharing is not None and sharing.wipes)
        self.shared = None if sharing is None else SharedBlocks(self._pool, block_size, sharing)
        self._sequences: dict[int, SequenceBlocks] = {}
        self._num_positions = 0
        self._num_owned = 0  # entries of all tables: one that three share counts three times
        self.curve = ReuseCurve()
        self._publisher = Publisher(self.shared, self._pool, block_size, self.curve) if self.shared else None
        self._targets: dict[int, int] = {}  # while a smaller size is made ready: block -> where it goes
        self._damage: str | None = None  # what an operation met that cannot be, until `rebuild`
        self._doubt: str | None = None  # what went wrong half-way, until `check` examines what it left
        self._num_rebuilds = 0
        self._num_quarantined = 0

    @property
    def num_blocks(self) -> int:
        """Blocks that exist."""
        return self._pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody holds and nothing is kept in."""
        return self._pool.num_free

    def is_held(self, block: int) -> bool:
        """True where a sequence, a pin or a copy holds the block."""
        return self._pool.num_holders(block) > 0

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` positions."""
        return -(-num_tokens // self.block_size)

    def blocks_to_open(self, num_tokens: int, reserve: int) -> int:
        """Blocks that `open` will take for a sequence of `num_tokens` known tokens, `reserve` at the most."""
        if self.mode == "paged":
            return self.blocks_for(num_tokens)
        return self.blocks_for(reserve) if self.mode == "contiguous" else 0

    def can_open(
        self, num_tokens: int, reserve: int, spare: int = 0, tokens: array[int] | None = None,
        options: CacheOptions = DEFAULT_CACHE_OPTIONS,
    ) -> bool:  # fmt: skip
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
        self, seq_id: int, num_tokens: int, reserve: int, tokens: array[int] | None = None,
        options: CacheOptions = DEFAULT_CACHE_OPTIONS, again: bool = False,
    ) -> Lookup:  # fmt: skip
        """Begin a sequence of `num_tokens` known tokens, `reserve` at the most. again: it ran before and was put off,
        or is a further choice of its request; what it asks for and hits is counted apart, and not in the curve.

        tokens: the caller's `array('i')`, kept and read as it grows; without it nothing is shared. Afterwards the
        sequence's history is `num_tokens` (0 in mode none, which takes blocks only for a step), and what was hit is
        committed: at least the last known token is left to be computed. Raises CapacityError where blocks are short.
        """
        assert seq_id not in self._sequences, f"sequence {seq_id} is open already"
        assert 0 <= num_tokens <= reserve, (num_tokens, reserve)
        if self.shared is not None and self._publisher is not None:
            return self._open_shared(self.shared, self._publisher, seq_id, num_tokens, tokens, options, again)
        count = self.blocks_to_open(num_tokens, reserve)
        table = self._pool.allocate_run(count) if self.mode == "contiguous" else self._pool.allocate(count)
        history = 0 if self.mode == "none" else num_tokens
        self._sequences[seq_id] = SequenceBlocks(table, 0, history)
        self._num_owned += len(table)
        self._num_positions += history
        return Lookup(0)

    def _open_shared(
        self, shared: SharedBlocks, publisher: Publisher, seq_id: int, num_tokens: int,
        tokens: array[int] | None, options: CacheOptions, again: bool,
    ) -> Lookup:  # fmt: skip
        bypass = tokens is None or options.bypass
        if tokens is None:
            tokens, options = array("i"), CacheOptions(options.tenant, options.salt, options.public, bypass=True)
        entry = shared.entry(options, tokens, num_tokens)
        table, lookup, missing, edges = shared.enter(entry, again)
        sequence = SequenceBlocks(table, entry.num_hit, num_tokens, account=entry.account, node=entry.node)
        if shared.windows is not None:
            tail = None if entry.tail is None else entry.tail.block
            shared.windows.enter(sequence, len(entry.shared), tail, entry.num_tail_tokens)
        sequence.root = entry.match.root
        sequence.root.num_sequences += 1
        entry.account.num_sequences += 1
        if not bypass:
            sequence.tokens, sequence.retain = tokens, options.retain
            sequence.missing, sequence.edges, sequence.first_missing = missing, edges, len(entry.shared)
            sequence.publish_at = (len(entry.shared) + 1) * self.block_size
            self.curve.record([] if again else [node.key for node in entry.match.nodes] + missing)
            for node in entry.match.nodes if options.retain else ():
                publisher.retain(sequence, node)
        self._sequences[seq_id] = sequence
        self._num_owned += len(table)
        self._num_positions += num_tokens
        return lookup

    def can_resize(self, seq_id: int, num_tokens: int) -> bool:
        """True where `resize` will succeed."""
        sequence = self._sequences[seq_id]
        growth = -(-num_tokens // self.block_size) - len(sequence.table)
        if growth > 0:
            return self.mode != "contiguous" and self._can_take(sequence, growth)
        if num_tokens >= sequence.committed or self._publisher is None:
            return True
        if sequence.first_read:
            return self._publisher.can_rewind(sequence, num_tokens)
        return not self._publisher.must_copy(sequence, num_tokens) or self._can_take(sequence, 1)

    def resize(self, seq_id: int, num_tokens: int) -> None:
        """Set a sequence's history to `num_tokens`: growth for the next tokens, rollback and truncation alike.

        Growth takes whole blocks, shrinking frees whole blocks and un-commits what lies beyond (contiguous keeps its
        reservation). A rollback into a block that others may read goes on in a copy of it. Raises CapacityError where
        blocks are short.
        """
        sequence, asked = self._sequences[seq_id], num_tokens
        assert num_tokens >= 0
        table = sequence.table
        count = -(-num_tokens // self.block_size)
        if count > len(table):
            self._grow(sequence, num_tokens, count)
        elif num_tokens < sequence.history:
            sequence.missing = sequence.edges = ()
            if sequence.first_read and self.shared is not None and self.shared.windows is not None:
                num_tokens = self._rewind(self.shared.windows, seq_id, sequence, num_tokens)
                count = -(-num_tokens // self.block_size)
            if self._publisher is not None and num_tokens < sequence.committed:
                self._publisher.roll_back(sequence, num_tokens)
            if count < len(table) and self.mode != "contiguous":
                self._release(table[count:])
                self._num_owned -= len(table) - count
                del table[count:]
        self._num_positions += num_tokens - sequence.history
        sequence.history = num_tokens
        if num_tokens < sequence.committed:
            sequence.committed = num_tokens
        if num_tokens < asked:
            self.resize(seq_id, asked)

    def _rewind(self, windows: Windows, seq_id: int, sequence: SequenceBlocks, num_tokens: int) -> int:
        """Go back in the window groups, to where they still have what the next token reads: what lies between is to be
        computed again. Returns that length."""
        if not self.can_resize(seq_id, num_tokens):
            raise CapacityError("a rollback needs blocks of the KV cache and there are none", retry_after_s=1.0)
        if num_tokens < sequence.committed:
            num_tokens = windows.longest(sequence.table, num_tokens)
        windows.roll_back(sequence, num_tokens, -(-num_tokens // self.block_size))
        return num_tokens

    def _grow(self, sequence: SequenceBlocks, num_tokens: int, count: int) -> None:
        table = sequence.table
        if self.mode == "contiguous":
            raise CapacityError(
                f"the sequence needs {num_tokens} positions and {len(table) * self.block_size} were reserved; "
                f"raise max_model_len or set kv_cache to paged"
            )
        growth = count - len(table)
        if self.shared is not None:
            self.shared.grow(sequence, growth)
        else:
            table.extend(self._pool.allocate(growth))
        self._num_owned += growth

    def grow(self, sequence: SequenceBlocks, num_tokens: int) -> bool:
        """`resize` to at least what has been committed, where `can_resize`, in one go. False, and nothing is changed,
        where blocks are short. sequence: from `blocks_of`."""
        growth = -(-num_tokens // self.block_size) - len(sequence.table)
        if growth > 0:
            if self.mode == "contiguous" or not self._can_take(sequence, growth):
                return False
            self._grow(sequence, num_tokens, len(sequence.table) + growth)
        self._num_positions += num_tokens - sequence.history
        sequence.history = num_tokens
        return True

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
            assert self._publisher is not None
            self._publisher.publish(sequence)
        if sequence.first_read and self.shared is not None:
            self.shared.move_on(sequence)

    def publish_tail(self, seq_id: int) -> None:
        """Let what a running sequence has committed be found to its last token, as its siblings wish. What it writes
        behind that is its own; whoever hits the tail copies it."""
        if self._publisher is not None:
            self._publisher.publish_tail(self._sequences[seq_id])

    def close(self, seq_id: int, *, publish: bool = True) -> None:
        """End a sequence in whatever state. What it has committed stays to be found, the rest of its blocks is free.
        publish: False leaves out what was not published before.

        Whoever ends must get through: of what goes wrong here, the next `check` finds whether it did any harm.
        """
        sequence = self._sequences[seq_id]
        try:
            if publish and sequence.tokens is not None:
                self.publish_tail(seq_id)
        except Exception as error:
            self._doubts(seq_id, error)
        try:
            if sequence.first_read and self.shared is not None and self.shared.windows is not None:
                self.shared.windows.roll_back(sequence, 0, 0)
            self._release(sequence.table)
        except Exception as error:
            self._doubts(seq_id, error)
        del self._sequences[seq_id]
        if sequence.root is not None and sequence.account is not None:
            sequence.root.num_sequences -= 1
            sequence.account.num_sequences -= 1
        self._num_owned -= len(sequence.table)
        self._num_positions -= sequence.history

    def _doubts(self, seq_id: int, error: Exception) -> None:
        self._doubt = f"closing sequence {seq_id}: {error!r}"
        _LOG.error("closing a sequence of the KV cache: %s", type(error).__name__, exc_info=error)

    def grant(self, tenant: str, floor_tokens: int = 0, cap_tokens: int | None = None) -> None:
        """Name a tenant, with what other tenants' demand cannot push it below and what it cannot rise above, in token
        positions. Raises ConfigError, and changes nothing, where that cannot be. Without sharing there are none."""
        if self.shared is not None:
            self.shared.set_quota(tenant, *quota_blocks(floor_tokens, cap_tokens, self.block_size))

    def declare_public(self, name: str) -> None:
        """Let requests share the namespace `name` across tenants. Raises ConfigError for an empty name."""
        if self.shared is not None:
            self.shared.tenancy.declare_public(name)

    def is_capped(self, seq_id: int, num_tokens: int) -> bool:
        """True where a sequence cannot grow to `num_tokens` for its tenant's cap, whatever others give up."""
        sequence = self._sequences[seq_id]
        growth = max(self.blocks_for(num_tokens) - len(sequence.table), 1)  # or the copy of a rollback
        account = sequence.account
        return account is not None and account.cap is not None and growth > account.cap - account.used + account.cached

    def same_account(self, seq_id: int, other: int) -> bool:
        """True where both sequences' blocks are counted for one tenant."""
        return self._sequences[seq_id].account is self._sequences[other].account

    def _can_take(self, sequence: SequenceBlocks, count: int) -> bool:
        """True where the sequence could have so many more blocks now."""
        return count <= self._pool.num_free if self.shared is None else self.shared.can_take(sequence, count)

    def _release(self, blocks: array[int]) -> None:
        (self._pool if self.shared is None else self.shared).release(blocks)

    def check_options(self, options: CacheOptions) -> None:
        """Raise RequestError (403) where a request may not share in what it names: an unknown tenant where only known
        ones may, or a public namespace that nobody declared, as all are where nothing is shared."""
        (Tenancy(0, self.block_size) if self.shared is None else self.shared.tenancy).check(options)

    def cap_error(self, num_tokens: int, options: CacheOptions) -> CapacityError | None:
        """The error of a text that its tenant's cap can never hold, None where it can."""
        return None if self.shared is None else self.shared.cap_error(self.blocks_for(num_tokens), options)

    def pin_error(self, count: int) -> CapacityError | None:
        """The error of `count` blocks that are there but for pins, None where pins are not what stands in the way."""
        return None if self.shared is None else pin_error(count, self.shared.leases.num_blocks, self.num_blocks)

    def vacate(self, num_blocks: int) -> Moves:
        """Make ready for `num_blocks` blocks, sequences alive. Once these moves are made, `relocate` makes sequences
        follow them, and `set_num_blocks` ends it; with the present number, that gives it up instead.

        Raises CapacityError where sequences and pins use more, ConfigError where floors do and for no block at all;
        nothing is changed then.
        """
        check_size(self._pool, self.shared, num_blocks, self.mode, self.kv_spec)
        try:
            self._targets, moves = vacate(self._pool, self.shared, num_blocks, self.block_size)
        except IntegrityError as error:
            self._damage = str(error)
            raise
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

    def window_tables(self, sequence: SequenceBlocks, num_tokens: int) -> tuple[array[int], ...]:
        """Tables of the window groups for a step that computes a sequence up to so many tokens, with the pages that it
        needs; empty without groups. sequence: from `blocks_of`."""
        return self.shared.reach(sequence, num_tokens) if sequence.first_read and self.shared is not None else ()

    def window_table(self, seq_id: int, group: int) -> array[int]:
        """Pages of a sequence's blocks in a window group, in order; -1 for those that it reads no more."""
        assert self.shared is not None
        assert self.shared.windows is not None
        return self.shared.windows.table(self._sequences[seq_id], group)

    def moved(self, moves: Moves) -> None:
        """The data plane has made these moves."""
        if self.shared is not None:
            self.shared.moved(moves)

    def advance(self, now_s: float) -> None:
        """Move the cache's clock: leases and priorities end with it."""
        if self.shared is not None:
            self.shared.advance(now_s)

    def blocks_of(self, seq_id: int) -> SequenceBlocks:
        """The blocks and lengths of an open sequence, the same object until it is closed: to be read, not written."""
        return self._sequences[seq_id]

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
            num_asked_tokens=shared.num_asked[False] if shared else 0,
            num_hit_tokens=shared.num_hit[False] if shared else 0,
            num_reentry_tokens=shared.num_asked[True] if shared else 0,
            num_reentry_hit_tokens=shared.num_hit[True] if shared else 0,
            num_evicted_blocks=shared.num_evicted if shared else 0,
            num_left_blocks=dict(shared.num_left) if shared else {},
            num_rebuilds=self._num_rebuilds,
            num_quarantined_blocks=self._num_quarantined,
        )

    def keep_open(self, seq_ids: Collection[int]) -> None:
        """Close all other sequences, of which nothing more is published. Raises IntegrityError where one is missing."""
        for seq_id in self._sequences.keys() - seq_ids:
            self.close(seq_id, publish=False)
        if self._sequences.keys() != set(seq_ids):
            raise IntegrityError("a sequence that runs has no blocks in the KV cache")

    def check(self) -> None:
        """What production checks before each step, in O(1): every block is free, cached or owned, nothing contradicted
        itself since, and one more block in turn is what pool and tree say. Raises IntegrityError; see `rebuild`."""
        if (doubt := self._doubt) is not None:
            self._doubt = None
            try:
                self.examine()
            except Exception:
                self._damage = doubt
        if self._damage:
            raise IntegrityError(f"the KV cache contradicts itself: {self._damage}")
        pool, shared = self._pool, self.shared
        pool.check()
        num_held = self._num_owned + (shared.num_references if shared is not None else 0)
        if pool.num_references != num_held or self._num_owned * self.block_size < self._num_positions:
            raise IntegrityError(f"the KV cache lost count of its blocks: {self.stats()}")
        if shared is not None:
            shared.check()

    def rebuild(self) -> None:
        """Quarantine everything: no text is found any more, every sequence is gone and to be opened and computed again,
        every page that was in use is wiped before it is. For when the cache contradicts itself; never fails."""
        counts = self._pool.counts()
        self._num_rebuilds += 1
        self._num_quarantined += min(max(counts.num_active + counts.num_cached, 0), counts.num_blocks)
        self._sequences.clear()
        self._num_positions = self._num_owned = 0
        self._targets, self._damage, self._doubt = {}, None, None
        self._pool.reset()
        if self.shared is not None:
            self.shared.rebuild()

    def examine(self) -> None:
        """Every invariant of lengths and ownership, in O(num_blocks): whether what went wrong half-way left all sound.
        Raises IntegrityError, and what else a contradiction leads to."""
        self._pool.verify()
        self.check()
        if self.shared is not None:
            self.shared.verify()
            if self.shared.windows is not None:
                self.shared.windows.verify([each for each in self._sequences.values() if each.first_read])
        counted = verify_sequences(self._sequences, self._pool, self.shared, self.mode, self.block_size)
        if counted != (self._num_owned, self._num_positions):
            raise IntegrityError(f"{counted} blocks and positions in tables: {self.stats()}")

    def verify(self) -> None:
        """The same for tests, where nothing may go wrong at all."""
        if self._doubt:
            raise IntegrityError(f"the KV cache contradicts itself: {self._doubt}")
        self.examine()
