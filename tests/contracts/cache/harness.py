"""A prefix cache under test, with an executor that has no model, and what is checked after every operation.

The store holds, for each position of each block, a value that depends on every token before it. `compute` first makes
the moves that the cache asks for, then re-reads the whole history of the sequence through its table and compares it
with what an uncached run would have written, then writes the next positions. Wiped positions hold None. A cache is
reached through `Harness` alone (about ten operations), so that a deliberately broken one can be put in its place.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from pagemill.base.errors import CapacityError, ConfigError, IntegrityError
from pagemill.base.params import DEFAULT_CACHE_OPTIONS, CacheOptions, Retain
from pagemill.base.transfer import Moves
from pagemill.cache.entry import Removed, SharingConfig, Stored
from pagemill.cache.manager import CacheManager
from pagemill.cache.receipt import Lookup
from tests.fixtures.fake_executor import mix

Options = CacheOptions
BLOCK = 4


class ViolationError(AssertionError):
    """A cache broke a promise."""


@dataclass(slots=True)
class Text:
    """A live sequence. Mutated by Harness."""

    tokens: array[int]
    options: CacheOptions
    lookup: Lookup
    committed: int = 0


@dataclass(slots=True)
class Harness:
    """A cache, a store and the sequences. Mutated by every operation; each ends with `check`."""

    num_blocks: int = 12
    policy: str = "lru"
    make: Callable[[int, int, SharingConfig], CacheManager] = lambda n, b, s: CacheManager(n, b, "paged", s)
    cache: CacheManager = field(init=False)
    store: list[list[int | None]] = field(init=False)
    live: dict[int, Text] = field(default_factory=dict)
    leases: dict[int, tuple[int, ...]] = field(default_factory=dict)
    index: dict[bytes, Stored] = field(default_factory=dict)
    verified: dict[str, set[tuple[int, ...]]] = field(default_factory=dict)
    now_s: float = 0.0
    next_id: int = 0
    num_operations: int = 0
    num_hit: int = 0

    def __post_init__(self) -> None:
        self.cache = self.make(self.num_blocks, BLOCK, SharingConfig(policy=self.policy))
        self.store = [[None] * BLOCK for _ in range(self.num_blocks)]
        assert self.cache.shared is not None
        self.cache.shared.on_event = self.note

    def note(self, event: Stored | Removed) -> None:
        """Replay an event into the index that the cache must agree with."""
        if isinstance(event, Removed):
            self.index.pop(event.key)
        else:
            self.index[event.key] = event

    # The operations

    def open(self, tokens: list[int], options: Options = DEFAULT_CACHE_OPTIONS) -> int | None:
        """Open a sequence; its id, or None where there is no room. Prediction and outcome must agree."""
        cache, known = self.cache, array("i", tokens)
        possible = cache.can_open(len(tokens), 1000, 0, known, options)
        before = self.snapshot()
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
        text = self.live[self.next_id] = Text(known, options, lookup, lookup.num_hit)
        hit = tuple(tokens[: lookup.num_hit])
        if hit and not any(hit == each[: len(hit)] for each in self.verified.get(scope(options), ())):
            raise ViolationError(f"{hit} was hit in {scope(options)!r} and never verified there")
        self.num_hit += lookup.num_hit
        self.check()
        assert text.committed == cache.num_committed(self.next_id)
        return self.next_id

    def compute(self, seq_id: int, most: int) -> None:
        """One step of one sequence: moves, re-reading, writing, commit."""
        cache, text = self.cache, self.live[seq_id]
        self.move()
        table = cache.block_table(seq_id)
        start, end = text.committed, min(text.committed + most, cache.num_history(seq_id), len(text.tokens))
        value = 0
        for position in range(end):
            value = mix(value, text.tokens[position])
            block, slot = table[position // BLOCK], position % BLOCK
            if position < start:
                if self.store[block][slot] != value:
                    raise ViolationError(f"position {position} of {text} holds {self.store[block][slot]}, not {value}")
            else:
                filled = slot == 0 and any(each is not None for each in self.store[block])
                if filled and not self.rewritten(seq_id, position):
                    raise ViolationError(f"block {block} was handed out with its contents")
                self.store[block][slot] = value
        cache.commit(seq_id, end)
        text.committed = end
        self.verified.setdefault(scope(text.options), set()).add(tuple(text.tokens[:end]))
        self.check()

    def rewritten(self, seq_id: int, position: int) -> bool:
        """True where the sequence itself wrote this block before a rollback."""
        return position < self.highest.get(seq_id, 0)

    highest: dict[int, int] = field(default_factory=dict)

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
        text.committed = min(text.committed, num_tokens)
        self.check()

    def draft(self, seq_id: int, tokens: list[int]) -> None:
        """Write tokens that are then rejected: never committed, so never to be hit."""
        cache, text = self.cache, self.live[seq_id]
        if text.committed != len(text.tokens) or not self.extend(seq_id, tokens):
            return
        self.move()
        table = cache.block_table(seq_id)
        for position in range(text.committed, len(text.tokens)):
            self.store[table[position // BLOCK]][position % BLOCK] = -7
        self.highest[seq_id] = max(self.highest.get(seq_id, 0), len(text.tokens))
        self.roll_back(seq_id, text.committed)

    def share(self, seq_id: int) -> None:
        self.cache.publish_tail(seq_id)
        self.check()

    def close(self, seq_id: int) -> None:
        self.cache.close(seq_id)
        del self.live[seq_id]
        self.check()

    def pin(self, tokens: list[int], options: Options, seconds: float) -> None:
        assert self.cache.shared is not None
        before = self.snapshot()
        try:
            lease = self.cache.shared.pin(options, array("i", tokens), seconds)
        except CapacityError:
            if self.snapshot() != before:
                raise ViolationError("a failed pin changed something") from None
            return
        self.leases[lease.lease_id] = lease.blocks
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
        self.index = {key: replace(self.index[key], block=node.block) for key, node in cache.shared.tree.index.items()}
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
        if {key: event.block for key, event in self.index.items()} != {
            k: n.block for k, n in shared.tree.index.items()
        }:
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
        self.move()
        stats = self.cache.stats()
        if stats.num_free_blocks != self.num_blocks or any(v is not None for block in self.store for v in block):
            raise ViolationError(f"something is left at the end: {stats}")


def scope(options: Options) -> str:
    """Who may share, as the harness sees it."""
    return f"{options.tenant}/{options.salt!r}"


SCOPES = [
    CacheOptions("a"),
    CacheOptions("a", "x"),
    CacheOptions("a", ""),
    CacheOptions("b"),
    CacheOptions("b", bypass=True),
]


def exercise(harness: Harness, seed: int, num_steps: int) -> None:
    """Random operations on texts that share beginnings, in few namespaces."""
    draw = random.Random(seed)

    earlier: list[list[int]] = [[1, 2, 3, 1, 2]]

    def text() -> list[int]:
        if draw.random() < 0.4:
            found = draw.choice(earlier)
            return found[: draw.randint(1, len(found))]
        tail = [draw.choice((1, 2, 3)) for _ in range(4)]
        found = ([1] * draw.randint(0, 9) + [2] * draw.randint(0, 9) + tail)[draw.randint(0, 2) :]
        earlier.append(found)
        return found

    def options() -> CacheOptions:
        chosen = draw.choice(SCOPES)
        if draw.random() < 0.2:
            priority = draw.choice((0, 20, 90))
            return CacheOptions(chosen.tenant, chosen.salt, None, chosen.bypass, (Retain(0, 6, priority, 5.0),))
        return chosen

    for _ in range(num_steps):
        live = list(harness.live)
        kind = draw.random()
        if kind < 0.24 or not live:
            if harness.open(text(), options()) is None and live:
                harness.close(draw.choice(live))
        elif kind < 0.55:
            harness.compute(draw.choice(live), draw.choice((1, 3, 50)))
        elif kind < 0.68:
            harness.extend(draw.choice(live), text()[:3])
        elif kind < 0.74:
            seq_id = draw.choice(live)
            harness.roll_back(seq_id, draw.randint(1, len(harness.live[seq_id].tokens)))
        elif kind < 0.78:
            harness.draft(draw.choice(live), [9] * draw.randint(1, 6))
        elif kind < 0.82:
            harness.share(draw.choice(live))
        elif kind < 0.93:
            harness.close(draw.choice(live))
        elif kind < 0.96:
            harness.pin(text(), options(), draw.choice((1.0, 4.0)))
        elif kind < 0.97:
            harness.resize(draw.randint(1, 30))
        elif kind < 0.98:
            harness.advance(draw.choice((0.5, 3.0)))
        else:
            harness.purge(text(), options(), draw.choice(("text", "prefix", "namespace", "tenant")))
    harness.finish()
