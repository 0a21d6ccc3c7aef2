"""Everything that decides what a prefix cache keeps, at once, against a model that works it all out anew.

Priorities and times to live by range, pins with leases, floors and caps that change, tenants, salts and a public
namespace, sweeps of low priority, forks, rollbacks, aborts in every state, purges, other sizes, under every policy:
after each operation the same texts can be found, with the same priorities, and accounts, leases, hits and refusals
agree. Where a policy has a slow model, so does each victim; where it has none, the model is told whom the cache evicted
and demands that it was one of those who had to give.
"""

from __future__ import annotations

import random
from array import array
from collections import deque
from dataclasses import dataclass, field

import pytest

from pagemill.base.errors import CapacityError, ConfigError, RequestError
from pagemill.base.params import CacheOptions, Retain
from pagemill.base.transfer import Moves
from pagemill.cache.block import Node
from pagemill.cache.entry import Removed, Stored
from pagemill.cache.manager import CacheManager
from tests.fixtures.policy_makers import EVERY_POLICY, bare, sharing_of
from tests.fixtures.policy_models import SlowARC, SlowGDSF, SlowLFU, SlowLRU, SlowS3FIFO
from tests.fixtures.slow_cache import Block, Name, SlowCache

SIZE = 3
QUOTAS: dict[str, tuple[int, int | None]] = {"floored": (4, None), "capped": (0, 9), "both": (2, 7)}
TENANTS = ["default", "other", *QUOTAS]
PUBLIC = "p"
MODELS: dict[str, type[SlowLRU]] = {
    "lru": SlowLRU, "lfu": SlowLFU, "s3fifo": SlowS3FIFO, "arc": SlowARC, "gdsf": SlowGDSF,
}  # fmt: skip
FIXED = ("s3fifo", "arc", "gdsf")  # whose slow models have one size
SEEDS, STEPS = 12, 150  # seeds for each policy, none for two


@dataclass
class ToldCache(SlowCache):
    """The slow cache without an order of its own: it is told who has left, and checks that those could and had to.

    gone: names of the blocks that the cache has evicted and the model has not yet, in order.
    """

    gone: deque[Name] = field(default_factory=deque)

    def evict(self, partitions: list[str]) -> None:
        """Of the lowest priority, among equals of the partition named first; in no use and with nothing behind it."""
        assert self.gone, "a block has to leave and none has left"
        held = set(self.held())
        leaves = [b for name, b in self.tree.items() if b not in held and not self.children(name)]
        places = {b: (b.priority, partitions.index(at)) for b in leaves if (at := self.at(b)) in partitions}
        name = self.gone.popleft()
        assert name in self.tree, f"{name} has left, which was not there"
        block = self.tree[name]
        assert block in places, f"{block} has left, which is in use or followed, or another had to give"
        assert places[block] == min(places.values()), f"{block} has left before others of less priority"
        self.num_evicted += 1
        self.discard(block, evicted=True)

    def at(self, block: Block) -> str:
        """The partition of a block."""
        return block.tenant if block.tenant in self.quotas else ""


class Both:
    """A cache and the model, to which everything is done. Mutated by every operation, which ends with a comparison."""

    def __init__(self, policy: str, seed: int) -> None:
        self.draw = random.Random(seed)
        self.policy = bare(policy)
        num_blocks = self.draw.choice((16, 20, 32))
        self.cache = CacheManager(num_blocks, SIZE, "paged", sharing_of(policy))
        self.told: deque[Name] | None = None if self.policy in MODELS else deque()
        if self.told is None:
            self.slow = SlowCache(num_blocks, SIZE, MODELS[self.policy], dict(QUOTAS))
        else:
            self.slow = ToldCache(num_blocks, SIZE, SlowLRU, dict(QUOTAS), gone=self.told)
        assert self.cache.shared is not None
        self.shared = self.cache.shared
        self.shared.on_event = self.note
        self.shared.tenancy.declare_public(PUBLIC)
        for tenant, (floor, cap) in QUOTAS.items():
            self.shared.set_quota(tenant, floor, cap)
        self.texts: list[list[int]] = [[1, 2, 3, 4]]
        self.asked: list[tuple[list[int], CacheOptions]] = []
        self.known: dict[int, array[int]] = {}
        self.names: dict[bytes, Name] = {}  # by key, of what is published
        self.now_s = 0.0
        self.next_id = 0
        self.counts: dict[str, int] = {}

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def note(self, event: Stored | Removed) -> None:
        """The cache has published or dropped a block."""
        if isinstance(event, Stored):
            self.names[event.key] = self.name(self.shared.tree.nodes[event.block])
            return
        name = self.names.pop(event.key)
        if event.evicted and self.told is not None:
            self.told.append(name)

    def name(self, node: Node) -> Name:
        """What the model calls a published block."""
        tree = self.shared.tree
        chain = tree.chain(node)
        [namespace] = [each for (each, _), root in tree._roots.items() if root is chain[0].parent]
        tokens = b"".join(each.tokens for each in chain)
        public = namespace.tenant if namespace.public else None
        options = CacheOptions("nobody" if public else namespace.tenant, namespace.salt, public)
        return self.slow.scope(options), tuple(memoryview(tokens).cast("i"))

    def text(self) -> list[int]:
        draw = self.draw
        if draw.random() < 0.6:
            found = list(draw.choice(self.texts))
            cut = draw.randint(1, len(found))
            found = found[:cut] + [draw.randint(1, 3) for _ in range(draw.randint(0, 3))]
        else:
            found = [draw.randint(1, 4) for _ in range(draw.randint(1, 14))]
        self.texts = [*self.texts[-12:], found]
        return found

    def options(self) -> CacheOptions:
        draw = self.draw
        retain: tuple[Retain, ...] = ()
        if draw.random() < 0.4:
            start = draw.randint(0, 4)
            ttl_s = draw.choice((None, None, 1.0, 3.0))
            retain = (Retain(start, start + draw.randint(1, 9), draw.choice((0, 20, 50, 80, 90)), ttl_s),)
        salt = "salt" if draw.random() < 0.1 else None
        public = PUBLIC if draw.random() < 0.2 else None
        return CacheOptions(draw.choice(TENANTS), salt, public, retain=retain)

    def seen(self) -> tuple[list[int], CacheOptions]:
        """A text that was asked for lately, in the namespace in which it was."""
        return self.draw.choice(self.asked[-8:]) if self.asked else (self.text(), self.options())

    def open(self, tokens: list[int], options: CacheOptions) -> None:
        self.next_id += 1
        self.asked.append((tokens, options))
        known = array("i", tokens)
        if not self.cache.can_open(len(tokens), 999, 0, known, options):
            self.count("refused")
            with pytest.raises(CapacityError):
                self.cache.open(self.next_id, len(tokens), 999, known, options)
            assert self.slow.open(self.next_id, options, tokens) is None
            return
        lookup = self.cache.open(self.next_id, len(tokens), 999, known, options)
        assert lookup.num_hit == self.slow.open(self.next_id, options, tokens)
        self.count("hits" if lookup.num_hit else "misses")
        if options.public is not None and lookup.num_hit:
            self.count("public hits")
        self.known[self.next_id] = known
        self.cache.moved(self.cache.moves())

    def compute(self, seq_id: int, most: int) -> None:
        end = min(self.cache.num_committed(seq_id) + most, len(self.known[seq_id]))
        self.cache.commit(seq_id, end)
        self.slow.commit(seq_id, end)

    def extend(self, seq_id: int, tokens: list[int]) -> None:
        length = len(self.known[seq_id]) + len(tokens)
        if self.change(seq_id, length):
            self.known[seq_id].extend(tokens)
            assert self.slow.extend(seq_id, tokens)
        else:
            assert not self.slow.extend(seq_id, tokens)

    def roll_back(self, seq_id: int, num_tokens: int) -> None:
        """Some of its tokens are taken back, as rejected drafts are; what others read of them stays theirs."""
        text = self.slow.texts[seq_id]
        copies = num_tokens < text.committed and self.slow.must_copy(text, num_tokens)
        if self.change(seq_id, num_tokens):
            del self.known[seq_id][num_tokens:]
            assert self.slow.roll_back(seq_id, num_tokens)
            assert bool(self.cache.moves().copies) == copies
            self.cache.moved(self.cache.moves())
            self.count("rollbacks by a copy" if copies else "rollbacks")
        else:
            assert not self.slow.roll_back(seq_id, num_tokens)

    def change(self, seq_id: int, length: int) -> bool:
        """Give a sequence of the cache another length; False where that is refused, as it was foretold."""
        if not self.cache.can_resize(seq_id, length):
            with pytest.raises(CapacityError):
                self.cache.resize(seq_id, length)
            return False
        self.cache.resize(seq_id, length)
        return True

    def close(self, seq_id: int) -> None:
        """An end or an abort, whatever has been computed."""
        self.cache.close(seq_id)
        self.slow.close(seq_id)
        del self.known[seq_id]

    def fork(self, seq_id: int) -> None:
        """A further choice of the same request: the first one's text is published to its last token, and opened."""
        if self.cache.num_committed(seq_id) == len(self.known[seq_id]):
            self.cache.publish_tail(seq_id)
            self.slow.publish_tail(self.slow.texts[seq_id])
            self.open(list(self.known[seq_id]), self.slow.texts[seq_id].options)
            self.count("forks")

    def sweep(self) -> None:
        """A batch job reads much that nobody else will."""
        for _ in range(4):
            tokens = [self.draw.randint(5, 99) for _ in range(8)]
            self.open(tokens, CacheOptions("other", retain=(Retain(0, len(tokens), 5),)))
            if self.next_id in self.known:
                self.compute(self.next_id, 99)
                self.close(self.next_id)
        self.count("sweeps")

    def pin(self, tokens: list[int], options: CacheOptions, seconds: float) -> None:
        try:
            lease = self.shared.pin(options, array("i", tokens), seconds)
        except CapacityError:
            assert self.slow.pin(0, options, tokens, seconds) is None
            self.count("pins refused")
            return
        except RequestError:
            assert self.slow.pin(0, options, tokens, seconds) == 0, "nothing of it is there"
            return
        assert self.slow.pin(lease.lease_id, options, tokens, seconds) == len(lease.blocks)
        self.count("pins")

    def unpin(self) -> None:
        for lease_id in list(self.slow.leases)[:1]:
            assert self.shared.unpin(lease_id)
            self.slow.unpin(lease_id)

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
        self.cache.advance(self.now_s)
        self.slow.advance(self.now_s)

    def purge(self, options: CacheOptions, tokens: list[int]) -> None:
        if self.draw.random() < 0.3:
            self.shared.purge_tenant(options.tenant)
            self.slow.purge_tenant(options.tenant)
        else:
            self.shared.purge_text(options, array("i", tokens))
            self.slow.purge_text(options, tokens)
        self.count("purges")

    def set_quota(self) -> None:
        tenant = self.draw.choice(list(QUOTAS))
        floor = self.draw.randint(1, 4)
        cap = self.draw.choice((None, floor + 3, floor + 6))
        try:
            self.shared.set_quota(tenant, floor, cap)
        except ConfigError:
            return
        self.slow.set_quota(tenant, floor, cap)
        self.count("quotas")

    def resize(self, num_blocks: int) -> None:
        self.cache.moved(self.cache.moves())
        if num_blocks < self.cache.num_blocks:
            try:
                moves = self.cache.vacate(num_blocks)
            except (CapacityError, ConfigError):
                assert not self.slow.resize(num_blocks)
                self.count("sizes refused")
                return
            assert self.slow.resize(num_blocks)
            self.cache.moved(Moves(moves.wipes))
            self.cache.relocate()
        else:
            assert self.slow.resize(num_blocks)
        self.cache.set_num_blocks(num_blocks)
        self.count("sizes")

    def step(self) -> None:
        draw, kind = self.draw, self.draw.random()
        live = list(self.known)
        if kind < 0.26 or not live:
            self.open(*self.seen()) if draw.random() < 0.4 else self.open(self.text(), self.options())
        elif kind < 0.48:
            self.compute(draw.choice(live), draw.choice((1, 4, 99)))
        elif kind < 0.54:
            self.extend(draw.choice(live), [draw.randint(1, 3) for _ in range(draw.randint(1, 4))])
        elif kind < 0.59:
            seq_id = max(draw.choices(live, k=3), key=self.cache.num_committed)
            self.roll_back(seq_id, draw.randint(1, len(self.known[seq_id])))
        elif kind < 0.74:
            self.close(draw.choice(live))
        elif kind < 0.78:
            self.fork(draw.choice(live))
        elif kind < 0.80:
            self.sweep()
        elif kind < 0.86:
            self.pin(*self.seen(), draw.choice((1.0, 4.0, 50.0)))
        elif kind < 0.88:
            self.unpin()
        elif kind < 0.93:
            self.advance(draw.choice((0.4, 1.5)))
        elif kind < 0.955:
            tokens, options = self.seen()
            self.purge(options, tokens)
        elif kind < 0.98 or self.policy in FIXED:
            self.set_quota()
        else:
            self.resize(draw.randint(6, 40))
        self.compare()

    def compare(self) -> None:
        """The same texts with the same priorities, the same accounts, the same leases."""
        self.cache.verify()
        found = {self.name(node): node.priority for node in self.shared.tree.nodes.values()}
        assert found == dict(self.slow)
        assert not self.told, "a block has left and none had to"
        stats = self.cache.stats()
        assert stats.num_free_blocks == self.slow.num_free()
        assert stats.num_evicted_blocks == self.slow.num_evicted
        for options in (*map(CacheOptions, TENANTS), CacheOptions(public=PUBLIC)):
            account, tenant = self.shared.account_of(options), self.slow.tenant(options)
            assert (account.used, account.cached) == (self.slow.used(tenant), self.slow.cached(tenant)), tenant
        assert stats.num_pinned_blocks == len({b for blocks, _, _ in self.slow.leases.values() for b in blocks})


@pytest.mark.parametrize("policy", EVERY_POLICY)
def test_all_of_retention_together_does_what_the_slow_model_does(policy: str) -> None:
    totals: dict[str, int] = {}
    first = EVERY_POLICY.index(policy) * SEEDS
    for seed in range(first, first + SEEDS):
        both = Both(policy, seed)
        for step in range(STEPS):
            try:
                both.step()
            except AssertionError as error:
                raise AssertionError(f"policy {policy}, seed {seed}, step {step}: {error}") from error
        for seq_id in list(both.known):
            both.close(seq_id)
        both.compare()
        for what, count in {**both.counts, "evicted": both.slow.num_evicted}.items():
            totals[what] = totals.get(what, 0) + count
    expected = ["hits", "misses", "refused", "forks", "sweeps", "pins", "purges", "quotas", "evicted"]
    expected += ["public hits", "rollbacks", "rollbacks by a copy"]
    if bare(policy) not in FIXED:
        expected += ["sizes", "sizes refused"]
    assert all(totals.get(what, 0) >= 5 for what in expected), totals


def ignore(what: str, both: Both) -> None:
    """Make the model blind for one thing."""
    if what == "floor":
        both.slow.quotas["floored"] = (0, None)
    elif what == "lease":
        both.slow.leases.clear()
    else:
        for block in both.slow.tree.values():
            both.slow.shelve(block, 50)


def run_blind(policy: str, what: str) -> None:
    for seed in range(SEEDS):
        both = Both(policy, seed)
        for _ in range(STEPS):
            ignore(what, both)
            both.step()


@pytest.mark.parametrize("policy", ["lru", "native adaptive"])
@pytest.mark.parametrize("what", ["priority", "floor", "lease"])
def test_a_model_that_ignores_one_of_them_disagrees(policy: str, what: str) -> None:
    with pytest.raises(AssertionError):
        run_blind(policy, what)
