"""Everything that decides what a prefix cache keeps, at once, against a model that works it all out anew.

Priorities and times to live by range, pins with leases, floors and caps that change, tenants and salts, sweeps of low
priority, forks, aborts in every state, purges, other sizes, under several policies: after each operation the same texts
can be found, with the same priorities, and accounts, leases, hits and refusals agree.
"""

from __future__ import annotations

import random
from array import array

import pytest

from pagemill.base.errors import CapacityError, ConfigError
from pagemill.base.params import CacheOptions, Retain
from pagemill.base.transfer import Moves
from pagemill.cache.entry import SharingConfig
from pagemill.cache.manager import CacheManager
from tests.fixtures.policy_models import SlowARC, SlowLFU, SlowLRU, SlowS3FIFO
from tests.fixtures.slow_cache import SlowCache

SIZE = 3
QUOTAS: dict[str, tuple[int, int | None]] = {"floored": (4, None), "capped": (0, 9), "both": (2, 7)}
TENANTS = ["default", "other", *QUOTAS]
MODELS: dict[str, type[SlowLRU]] = {"lru": SlowLRU, "lfu": SlowLFU, "s3fifo": SlowS3FIFO, "arc": SlowARC}
RESIZED = ("lru", "lfu")  # whose order does not depend on the size
SEEDS, STEPS = 12, 150


class Both:
    """A cache and the model, to which everything is done. Mutated by every operation, which ends with a comparison."""

    def __init__(self, policy: str, seed: int) -> None:
        self.draw = random.Random(seed)
        self.policy = policy
        num_blocks = self.draw.choice((16, 20, 32))
        self.cache = CacheManager(num_blocks, SIZE, "paged", SharingConfig(policy=policy))
        self.slow = SlowCache(num_blocks, SIZE, MODELS[policy], dict(QUOTAS))
        assert self.cache.shared is not None
        self.shared = self.cache.shared
        for tenant, (floor, cap) in QUOTAS.items():
            self.shared.set_quota(tenant, floor, cap)
        self.texts: list[list[int]] = [[1, 2, 3, 4]]
        self.asked: list[tuple[list[int], CacheOptions]] = []
        self.known: dict[int, array[int]] = {}
        self.now_s = 0.0
        self.next_id = 0
        self.counts: dict[str, int] = {}

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

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
        return CacheOptions(draw.choice(TENANTS), salt, retain=retain)

    def seen(self) -> tuple[list[int], CacheOptions]:
        """A text that was asked for lately, in the namespace in which it was."""
        return self.draw.choice(self.asked[-8:]) if self.asked else (self.text(), self.options())

    def open(self, tokens: list[int], options: CacheOptions) -> None:
        self.next_id += 1
        self.asked.append((tokens, options))
        known = array("i", tokens)
        possible = self.cache.can_open(len(tokens), 999, 0, known, options)
        expected = self.slow.open(self.next_id, options, tokens)
        assert possible == (expected is not None)
        if expected is None:
            self.count("refused")
            with pytest.raises(CapacityError):
                self.cache.open(self.next_id, len(tokens), 999, known, options)
            return
        lookup = self.cache.open(self.next_id, len(tokens), 999, known, options)
        assert lookup.num_hit == expected
        self.count("hits" if expected else "misses")
        self.known[self.next_id] = known
        self.cache.moved(self.cache.moves())

    def compute(self, seq_id: int, most: int) -> None:
        end = min(self.cache.num_committed(seq_id) + most, len(self.known[seq_id]))
        self.cache.commit(seq_id, end)
        self.slow.commit(seq_id, end)

    def extend(self, seq_id: int, tokens: list[int]) -> None:
        expected = self.slow.extend(seq_id, tokens)
        length = len(self.known[seq_id]) + len(tokens)
        assert self.cache.can_resize(seq_id, length) == expected
        if not expected:
            with pytest.raises(CapacityError):
                self.cache.resize(seq_id, length)
            return
        self.cache.resize(seq_id, length)
        self.known[seq_id].extend(tokens)

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
        assert self.slow.pin(lease.lease_id, options, tokens, seconds) == len(lease.blocks)
        self.count("pins" if lease.blocks else "empty pins")

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
        elif kind < 0.50:
            self.compute(draw.choice(live), draw.choice((1, 4, 99)))
        elif kind < 0.58:
            self.extend(draw.choice(live), [draw.randint(1, 3) for _ in range(draw.randint(1, 4))])
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
        elif kind < 0.98 or self.policy not in RESIZED:
            self.set_quota()
        else:
            self.resize(draw.randint(6, 40))
        self.compare()

    def compare(self) -> None:
        """The same texts with the same priorities, the same accounts, the same leases."""
        self.cache.verify()
        tree = self.shared.tree
        found = {}
        for (namespace, _), root in tree._roots.items():
            scope = f"{namespace.tenant}/{namespace.salt!r}/{self.slow.epochs.get(namespace.tenant, 0)}"
            for node in tree.below(root):
                tokens = b"".join(each.tokens for each in tree.chain(node))
                found[scope, tuple(memoryview(tokens).cast("i"))] = node.priority
        assert found == dict(self.slow)
        stats = self.cache.stats()
        assert stats.num_free_blocks == self.slow.num_free()
        assert stats.num_evicted_blocks == self.slow.num_evicted
        for tenant in TENANTS:
            account = self.shared.account_of(CacheOptions(tenant))
            assert (account.used, account.cached) == (self.slow.used(tenant), self.slow.cached(tenant)), tenant
        assert stats.num_pinned_blocks == len({b for blocks, _, _ in self.slow.leases.values() for b in blocks})


@pytest.mark.parametrize("policy", MODELS)
def test_all_of_retention_together_does_what_the_slow_model_does(policy: str) -> None:
    totals: dict[str, int] = {}
    for seed in range(SEEDS):
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
    if policy in RESIZED:
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


def run_blind(what: str) -> None:
    for seed in range(SEEDS):
        both = Both("lru", seed)
        for _ in range(STEPS):
            ignore(what, both)
            both.step()


@pytest.mark.parametrize("what", ["priority", "floor", "lease"])
def test_a_model_that_ignores_one_of_them_disagrees(what: str) -> None:
    with pytest.raises(AssertionError):
        run_blind(what)
