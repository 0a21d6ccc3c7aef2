"""A prefix cache under test, with an executor that has no model, and what is checked after every operation.

The store holds, for each position of each block, a value that depends on every token before it. `compute` first makes
the moves that the cache asks for, then compares what the sequence hit with what an uncached run would have written,
writes the next positions, and re-reads the whole history through the table: the logits, which are all that was read
folded together, must be those of a run without a cache. Wiped positions hold None. What a look-up finds is compared
with `slow_index.py`, to the token, and in plain least-recently-used order so is each victim. A cache is reached through
`Harness` alone (about a dozen operations), so that a broken one can be put in its place.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from pagemill.base.errors import CapacityError, ConfigError, IntegrityError, RequestError
from pagemill.base.params import DEFAULT_CACHE_OPTIONS, CacheOptions
from pagemill.base.transfer import Moves
from pagemill.cache.entry import Removed, SharingConfig, Stored
from pagemill.cache.manager import CacheManager
from pagemill.cache.receipt import Lookup
from tests.contracts.cache.slow_index import SlowIndex, ViolationError
from tests.fixtures.fake_executor import mix
from tests.fixtures.policy_makers import sharing_of

Options = CacheOptions
BLOCK = 4


@dataclass(slots=True)
class Text:
    """A live sequence. Mutated by Harness. num_unread: tokens that it hit and no step has read."""

    tokens: array[int]
    options: CacheOptions
    lookup: Lookup
    num_unread: int
    committed: int


@dataclass(slots=True)
class Harness:
    """A cache, a store and the sequences. Mutated by every operation; each ends with `check`.

    plain: neither priorities nor quotas nor another size, so that the slow model can say who is evicted (policy lru).
    """

    num_blocks: int = 12
    policy: str = "lru"
    plain: bool = False
    make: Callable[[int, int, SharingConfig], CacheManager] = lambda n, b, s: CacheManager(n, b, "paged", s)
    cache: CacheManager = field(init=False)
    store: list[list[int | None]] = field(init=False)
    live: dict[int, Text] = field(default_factory=dict)
    leases: dict[int, tuple[int, ...]] = field(default_factory=dict)
    index: SlowIndex = field(init=False)
    verified: dict[str, set[tuple[int, ...]]] = field(default_factory=dict)
    now_s: float = 0.0
    next_id: int = 0
    num_operations: int = 0
    num_hit: int = 0
    num_evicted: int = 0
    highest: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cache = self.make(self.num_blocks, BLOCK, sharing_of(self.policy))
        self.store = [[None] * BLOCK for _ in range(self.num_blocks)]
        assert self.cache.shared is not None
        self.cache.shared.tenancy.declare_public("p")
        self.index = SlowIndex(self.cache.shared, BLOCK)
        self.cache.shared.on_event = self.note

    def note(self, event: Stored | Removed) -> None:
        """Replay an event into the index that the cache must agree with; in a plain harness, the victim is the leaf
        that nobody holds whose last use is longest ago."""
        shared = self.cache.shared
        assert shared is not None
        if isinstance(event, Removed) and event.evicted:
            self.num_evicted += 1
            stored, used, num_holders = self.index.stored, self.index.used, self.cache._pool.num_holders
            followed = {each.parent for each in stored.values()}
            # What leaves in the same run is out of the tree already, and told of in its turn.
            held = {node.key for node in shared.tree.nodes.values() if num_holders(node.block)}
            idle = stored.keys() - followed - held
            if self.plain and any(used[key] < used[event.key] for key in idle):
                raise ViolationError("a block was evicted before others whose last use is longer ago")
        self.index.note(event)

    # The operations

    def open(self, tokens: list[int], options: Options = DEFAULT_CACHE_OPTIONS) -> int | None:
        """Open a sequence; its id, or None where there is no room. Prediction and outcome must agree."""
        cache, known = self.cache, array("i", tokens)
        possible = cache.can_open(len(tokens), 1000, 0, known, options)
        before = self.snapshot()
        expected = self.index.longest(options, tokens)
        if possible and not options.bypass:
            assert cache.shared is not None
            tail = cache.shared.entry(options, known, len(tokens)).tail
            self.index.touched(options, tokens, None if tail is None else tail.key)
        self.next_id += 1
        try:
            lookup = cache.open(self.next_id, len(tokens), 1000, known, options)
        except CapacityError:
            if possible:
                raise ViolationError("admission promised what allocation did not find") from None
            if self.snapshot() != before:
                raise ViolationError("a failed open changed something") from None
            return None
        if not possible:
            raise ViolationError("admission refused what allocation found")
        if lookup.num_hit >= len(tokens) or (options.bypass and lookup.num_hit):
            raise ViolationError(f"{lookup} leaves nothing to compute, or went past a bypass")
        if not options.bypass:
            self.check_hit(lookup, options, expected)
        text = self.live[self.next_id] = Text(known, options, lookup, lookup.num_hit, lookup.num_hit)
        hit = tuple(tokens[: lookup.num_hit])
        if hit and not any(hit == each[: len(hit)] for each in self.verified.get(scope(options), ())):
            raise ViolationError(f"{hit} was hit in {scope(options)!r} and never verified there")
        self.num_hit += lookup.num_hit
        self.check()
        assert text.committed == cache.num_committed(self.next_id)
        return self.next_id

    def check_hit(self, lookup: Lookup, options: Options, expected: tuple[int, int]) -> None:
        """A look-up finds what the slow model does; a tail is left where its copy would take the last block."""
        shared, (whole, part) = self.cache.shared, expected
        assert shared is not None
        if lookup.num_hit == whole + part:
            return
        account = shared.tenancy.account(shared.tenancy.namespace(options.tenant, options.salt, options.public))
        if lookup.num_hit != whole or shared.available(account) > 0:
            raise ViolationError(f"{lookup} found other than {whole} tokens in blocks and {part} behind them")

    def compute(self, seq_id: int, most: int) -> None:
        """One step of one sequence: moves, writing, re-reading, commit."""
        cache, text = self.cache, self.live[seq_id]
        start, end = text.committed, min(text.committed + most, cache.num_history(seq_id), len(text.tokens))
        tables = self.reach(seq_id, end)
        self.move()
        table = cache.block_table(seq_id)
        value = 0
        for position in range(end):
            value = mix(value, text.tokens[position])
            block, slot = table[position // BLOCK], position % BLOCK
            if position < start:
                found = self.store[block][slot]
                if position < text.num_unread and found != value:
                    raise ViolationError(f"position {position} of the hit of {text} holds {found}, not {value}")
            else:
                filled = slot == 0 and any(each is not None for each in self.store[block])
                if filled and not self.rewritten(seq_id, position):
                    raise ViolationError(f"block {block} was handed out with its contents")
                self.store[block][slot] = value
        self.compute_windows(text.tokens, start, end, tables)
        self.check_logits(text, [self.store[table[each // BLOCK]][each % BLOCK] for each in range(end)])
        self.learn(text, end)
        cache.commit(seq_id, end)
        text.committed, text.num_unread = end, 0
        self.verified.setdefault(scope(text.options), set()).add(tuple(text.tokens[:end]))
        self.check()

    def reach(self, seq_id: int, end: int) -> tuple[array[int], ...]:
        """Tables of the window groups for a step up to `end`; none here."""
        return ()

    def compute_windows(self, tokens: array[int], start: int, end: int, tables: tuple[array[int], ...]) -> None:
        """Write positions from `start` on in the pages of window groups, and re-read what they read."""

    def check_logits(self, text: Text, history: list[int | None]) -> None:
        """What comes of all positions as they are read, the ones just written too, is what comes of them uncached."""
        logits = cold = value = 0
        for token, found in zip(text.tokens, history, strict=False):
            value = mix(value, token)
            logits, cold = mix(logits, -1 if found is None else found), mix(cold, value)
        if logits != cold:
            raise ViolationError(f"logits after {len(history)} tokens of {text} are {logits:x}, uncached {cold:x}")

    def rewritten(self, seq_id: int, position: int) -> bool:
        """True where the sequence itself wrote this block before a rollback."""
        return position < self.highest.get(seq_id, 0)

    def learn(self, text: Text, num_tokens: int) -> None:
        """So many tokens of a sequence are verified: its cache may publish them."""
        if not text.options.bypass:
            self.index.learn(text.options, list(text.tokens[:num_tokens]))

    def extend(self, seq_id: int, tokens: list[int]) -> bool:
        """Know more tokens and make room for them; False where there is none, which must change nothing."""
        cache, text = self.cache, self.live[seq_id]
        possible = cache.can_resize(seq_id, len(text.tokens) + len(tokens))
        before = self.snapshot()
        try:
            cache.resize(seq_id, len(text.tokens) + len(tokens))
        except CapacityError:
            if possible or self.snapshot() != before:
                raise ViolationError("a failed resize was promised, or changed something") from None
            return False
        if not possible:
            raise ViolationError("growth was refused and found")
        text.tokens.extend(tokens)
        self.check()
        return True

    def roll_back(self, seq_id: int, num_tokens: int) -> None:
        """Forget the tokens from `num_tokens` on, as when drafts are rejected."""
        cache, text = self.cache, self.live[seq_id]
        if not cache.can_resize(seq_id, num_tokens):
            before = self.snapshot()
            try:
                cache.resize(seq_id, num_tokens)
            except CapacityError:
                if self.snapshot() != before:
                    raise ViolationError("a failed rollback changed something") from None
                return
            raise ViolationError("a rollback was refused and made")
        self.highest[seq_id] = max(self.highest.get(seq_id, 0), text.committed)
        cache.resize(seq_id, num_tokens)
        del text.tokens[num_tokens:]
        text.committed = self.left_of(seq_id, min(text.committed, num_tokens))
        text.num_unread = min(text.num_unread, text.committed)
        self.check()

    def left_of(self, seq_id: int, committed: int) -> int:
        """How much of a text stays computed that goes back to so many tokens: all of it, here."""
        return committed

    def draft(self, seq_id: int, tokens: list[int]) -> None:
        """Write tokens that are then rejected: never committed, so never to be hit."""
        cache, text = self.cache, self.live[seq_id]
        if text.committed != len(text.tokens) or not self.extend(seq_id, tokens):
            return
        self.reach(seq_id, len(text.tokens))
        self.move()
        table = cache.block_table(seq_id)
        for position in range(text.committed, len(text.tokens)):
            self.store[table[position // BLOCK]][position % BLOCK] = -7
        self.highest[seq_id] = max(self.highest.get(seq_id, 0), len(text.tokens))
        self.roll_back(seq_id, text.committed)

    def share(self, seq_id: int) -> None:
        """Let siblings find all that a running sequence has written."""
        self.learn(self.live[seq_id], self.live[seq_id].committed)
        self.cache.publish_tail(seq_id)
        self.check()

    def fork(self, seq_id: int) -> int | None:
        """Another sequence that begins like this one, as a further choice of a request does."""
        self.share(seq_id)
        return self.open(list(self.live[seq_id].tokens), self.live[seq_id].options)

    def close(self, seq_id: int) -> Text:
        """End a sequence in whatever state: finished, aborted or preempted. Returns what it was."""
        self.learn(self.live[seq_id], self.live[seq_id].committed)
        self.cache.close(seq_id)
        text = self.live.pop(seq_id)
        self.check()
        return text

    def set_quota(self, tenant: str, floor: int, cap: int | None) -> None:
        """A floor and a cap; refused where they exceed the memory, which must change nothing."""
        assert self.cache.shared is not None
        before = self.snapshot()
        try:
            self.cache.shared.set_quota(tenant, floor, cap)
        except ConfigError:
            if self.snapshot() != before:
                raise ViolationError("a refused quota changed something") from None
        self.check()

    def pin(self, tokens: list[int], options: Options, seconds: float) -> None:
        assert self.cache.shared is not None
        before = self.snapshot()
        try:
            lease = self.cache.shared.pin(options, array("i", tokens), seconds)
        except (CapacityError, RequestError):
            if self.snapshot() != before:
                raise ViolationError("a failed pin changed something") from None
            return
        self.leases[lease.lease_id] = lease.blocks
        self.check()

    def unpin(self, lease_id: int) -> None:
        assert self.cache.shared is not None
        self.cache.shared.unpin(lease_id)
        self.leases.pop(lease_id, None)
        self.check()

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
        self.cache.advance(self.now_s)
        self.leases = {}
        self.check()

    def purge(self, tokens: list[int], options: Options, kind: str) -> None:
        """Drop texts; afterwards the wipe is done and nothing of them is found."""
        shared = self.cache.shared
        assert shared is not None
        known, name = array("i", tokens), scope(options)
        if kind == "text":
            shared.purge_text(options, known)
        elif kind == "prefix":
            shared.purge_prefix(options, known)
            if tokens:
                kept = self.verified.get(name, set())
                size = len(tokens) if len(tokens) < BLOCK else len(tokens) // BLOCK * BLOCK
                left = {each if each[: len(tokens)] != tuple(tokens) else each[:size] for each in kept}
                running = {tuple(t.tokens[: t.committed]) for t in self.live.values() if scope(t.options) == name}
                self.verified[name] = left | running  # what still runs is published again as it goes on
        elif kind == "namespace":
            shared.purge_namespace(options)
            self.verified.pop(name, None)
        else:
            shared.purge_tenant(options.tenant)
            self.verified = {
                each: texts for each, texts in self.verified.items() if not each.startswith(options.tenant + "/")
            }
        self.leases = {}
        self.move()
        self.check()

    def resize(self, num_blocks: int) -> None:
        """Another number of blocks, sequences alive; refused where they need more, which must change nothing."""
        self.move()
        before, cache = self.snapshot(), self.cache
        try:
            moves = cache.vacate(num_blocks) if num_blocks < self.num_blocks else None
        except (CapacityError, ConfigError):
            if self.snapshot() != before:
                raise ViolationError("a failed resize changed something") from None
            return
        if moves is not None:
            for block in moves.wipes:
                self.store[block] = [None] * BLOCK
            for copy in moves.copies:
                self.store[copy.target] = list(self.store[copy.source])
            cache.moved(Moves(moves.wipes))
            cache.relocate()
        cache.set_num_blocks(num_blocks)
        del self.store[num_blocks:]
        self.store += [[None] * BLOCK for _ in range(num_blocks - len(self.store))]
        self.num_blocks, self.leases = num_blocks, {}
        assert cache.shared is not None
        stored = self.index.stored
        for key, node in cache.shared.tree.index.items():
            stored[key] = replace(stored[key], block=node.block)
        self.check()

    def move(self) -> None:
        """What the data plane does before a step; twice where a copy was the last to hold what a purge dropped."""
        for _ in range(2):
            if self.cache.moves():
                self.move_once()
        if self.cache.moves():
            raise ViolationError("moves are left after they were made")

    def move_once(self) -> None:
        moves = self.cache.moves()
        for block in moves.wipes:
            self.store[block] = [None] * BLOCK
        for copy in moves.copies:
            self.store[copy.target][: copy.num_positions] = self.store[copy.source][: copy.num_positions]
        self.cache.moved(moves)

    # What holds after each

    def snapshot(self) -> object:
        cache = self.cache
        assert cache.shared is not None
        tables = {s: (list(cache.block_table(s)), cache.num_committed(s), cache.num_history(s)) for s in self.live}
        return cache.stats(), tables, set(cache.shared.tree.index), cache.shared.moves()

    def check(self) -> None:
        self.num_operations += 1
        cache = self.cache
        shared = cache.shared
        assert shared is not None
        try:
            cache.verify()
        except IntegrityError as error:
            raise ViolationError(str(error)) from None
        stats = cache.stats()
        total = stats.num_free_blocks + stats.num_cached_blocks + stats.num_active_blocks + stats.num_held_blocks
        if total != self.num_blocks:
            raise ViolationError(f"blocks were lost or made: {stats}")
        replayed = {key: event.block for key, event in self.index.stored.items()}
        if replayed != {key: node.block for key, node in shared.tree.index.items()}:
            raise ViolationError("the replayed events are not the index")
        victim = shared.shelves.victim(range(len(shared.tenancy.accounts) + 1))
        if victim is not None:
            node = shared.tree.nodes[victim]
            pinned = any(victim in blocks for blocks in self.leases.values())
            in_use = any(victim in cache.block_table(seq_id) for seq_id in self.live)
            if pinned or in_use or node.children:
                raise ViolationError(f"block {victim} is a victim while pinned, in use or followed")
        for seq_id, text in self.live.items():
            if cache.num_committed(seq_id) != text.committed:
                raise ViolationError(
                    f"sequence {seq_id} has {cache.num_committed(seq_id)} committed, not {text.committed}"
                )

    def finish(self) -> None:
        """Close everything; all of it must then be free once purged, and wiped."""
        for seq_id in list(self.live):
            self.close(seq_id)
        self.advance(1e8)
        shared = self.cache.shared
        assert shared is not None
        for tenant in ("a", "b", "default"):
            shared.purge_tenant(tenant)
        shared.purge_namespace(CacheOptions("a", None, "p"))
        self.move()
        stats = self.cache.stats()
        if stats.num_free_blocks != self.num_blocks or any(v is not None for block in self.store for v in block):
            raise ViolationError(f"something is left at the end: {stats}")


def scope(options: Options) -> str:
    """Who may share, as the harness sees it."""
    return f"public {options.public}" if options.public else f"{options.tenant}/{options.salt!r}"
