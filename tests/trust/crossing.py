"""S2: look-ups of many tenants in texts that they have in common: who wrote each position that is hit?

Every position of every block remembers the scope of the sequence that wrote it, through wipes and copies. A hit on a
position of another scope is a crossing, and so is a reason for a miss that only another scope's history explains.
"""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass, field

from pagemill.base.errors import IntegrityError
from pagemill.base.params import CacheOptions
from pagemill.cache.manager import CacheManager
from pagemill.cache.receipt import Lookup
from tests.fixtures.policy_makers import SHIPPED, sharing_of
from tests.trust.figures import Figure

BLOCK = 4
NUM_BLOCKS = 192
NUM_TEXTS = 150
NUM_LOOKUPS = 20_000  # of one seed

# Names that become one another where they are joined, cut, folded or read as another kind of name.
SCOPES = [
    CacheOptions("a"), CacheOptions("ab"), CacheOptions("a", "b"), CacheOptions("ab", ""), CacheOptions("a", ""),
    CacheOptions("A"), CacheOptions("p"), CacheOptions("a", public="p"), CacheOptions("a", "b", public="p"),
    CacheOptions("\u00e9"), CacheOptions("e\u0301"), CacheOptions("a\x00b"), CacheOptions("a", "None"),
]  # fmt: skip


def common(a: array[int], b: array[int]) -> int:
    """How many tokens two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@dataclass(slots=True)
class Traffic:
    """One cache, its tenants and what they wrote. Mutated by `ask`."""

    seed: int
    cache: CacheManager = field(init=False)
    draw: random.Random = field(init=False)
    num_lookups: int = 0
    num_hits: int = 0
    crossings: list[str] = field(default_factory=list)
    _texts: list[array[int]] = field(init=False)
    _alike: list[list[int]] = field(init=False)
    _known: list[list[int]] = field(init=False)
    _writers: list[list[int]] = field(init=False)
    _next_id: int = 0

    def __post_init__(self) -> None:
        draw = self.draw = random.Random(self.seed)
        policy = "native lru" if self.seed % 5 else SHIPPED[self.seed // 5 % len(SHIPPED)]
        self.cache = CacheManager(NUM_BLOCKS, BLOCK, "paged", sharing_of(policy))
        assert self.cache.shared is not None
        self.cache.shared.tenancy.declare_public("p")
        self._texts = [array("i", [draw.randrange(3) for _ in range(draw.randint(2, 30))]) for _ in range(NUM_TEXTS)]
        self._alike = [[common(a, b) for b in self._texts] for a in self._texts]
        self._known = [[0] * NUM_TEXTS for _ in SCOPES]  # tokens of each text that the scope has written itself
        self._writers = [[-1] * BLOCK for _ in range(NUM_BLOCKS)]

    def ask(self) -> None:
        """One look-up of one tenant, whose sequence then computes the rest and ends, mostly at once."""
        draw, cache = self.draw, self.cache
        who, what = draw.randrange(len(SCOPES)), draw.randrange(NUM_TEXTS)
        tokens = self._texts[what]
        self._next_id += 1
        lookup = cache.open(self._next_id, len(tokens), 1000, tokens, SCOPES[who])
        moves = cache.moves()
        for block in moves.wipes:
            self._writers[block] = [-1] * BLOCK
        for copy in moves.copies:
            self._writers[copy.target][: copy.num_positions] = self._writers[copy.source][: copy.num_positions]
        cache.moved(moves)
        self._check(who, what, lookup)
        table, writers = cache.block_table(self._next_id), self._writers
        end = len(tokens) if draw.random() < 0.8 else draw.randint(lookup.num_hit, len(tokens))
        for position in range(lookup.num_hit, end):
            writers[table[position // BLOCK]][position % BLOCK] = who
        cache.commit(self._next_id, end)
        cache.close(self._next_id)
        if draw.random() < 0.0005:
            self._purge(who)
        if end > self._known[who][what]:
            alike = self._alike[what]
            self._known[who] = [max(old, min(new, end)) for old, new in zip(self._known[who], alike, strict=True)]

    def _check(self, who: int, what: int, lookup: Lookup) -> None:
        table, known = self.cache.block_table(self._next_id), self._known[who][what]
        self.num_lookups += 1
        self.num_hits += lookup.num_hit > 0
        for position in range(lookup.num_hit):
            writer = self._writers[table[position // BLOCK]][position % BLOCK]
            if writer != who:
                self.crossings.append(f"{SCOPES[who]} hit position {position}, written by scope {writer}")
                return
        if lookup.num_hit > known:
            self.crossings.append(f"{SCOPES[who]} hit {lookup.num_hit} tokens and wrote {known}")
        elif lookup.miss is not None and lookup.miss.reason != "not seen" and not self._explained(who, what, lookup):
            self.crossings.append(f"{SCOPES[who]} was told {lookup.miss.reason!r} beyond its own history")

    def _explained(self, who: int, what: int, lookup: Lookup) -> bool:
        """True where the scope's own texts reach as far as the reason speaks of: it wrote something at all, and for a
        text that goes on otherwise, up to that place."""
        assert lookup.miss is not None
        return any(self._known[who]) and self._known[who][what] >= lookup.miss.position

    def _purge(self, who: int) -> None:
        assert self.cache.shared is not None
        self.cache.shared.purge_namespace(SCOPES[who])


def count(seeds: range, num_lookups: int = NUM_LOOKUPS) -> Figure:
    """Look-ups of several caches, and how many of them crossed."""
    asked = hits = 0
    replays = []
    for seed in seeds:
        traffic = Traffic(seed)
        try:
            for _ in range(num_lookups):
                traffic.ask()
            traffic.cache.verify()
        except IntegrityError as error:  # a cache that finds itself broken is no better
            traffic.crossings.append(str(error))
        asked += traffic.num_lookups
        hits += traffic.num_hits
        if traffic.crossings:
            replays.append(f"python scripts/trust.py --replay S2:{seed}  # {traffic.crossings[0]}")
    return Figure("S2", "hits across tenants", len(replays), asked, "look-ups", {"look-ups that hit": hits}, replays)
