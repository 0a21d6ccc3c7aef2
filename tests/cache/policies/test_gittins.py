from __future__ import annotations

import random

import pytest

from pagemill.cache.policies.base import BlockInfo
from pagemill.cache.policies.gittins import Gittins
from pagemill.cache.policies.reuse import ReuseLearner
from tests.fixtures.policy_models import Driver, SlowBlock, SlowLRU

INFO = BlockInfo(num_tokens=16)


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


class SlowGittins(SlowLRU):
    """The same classes and index, the victim by a search over all blocks. Reads the fast one's index and classes."""

    def __init__(self, fast: Gittins, capacity: int) -> None:
        super().__init__(capacity)
        self.fast = fast

    def place(self, each: SlowBlock) -> tuple[float, ...]:
        fast = self.fast
        block = next(block for block, other in self.blocks.items() if other is each)
        kind = fast._entries[block].row // fast._num_buckets
        bucket = sum(edge <= fast._aged_at - each.used for edge in fast._learner.edges)
        return (fast._places[kind * fast._num_buckets + bucket], each.used)


@pytest.mark.parametrize("capacity", [3, 12, 40])
@pytest.mark.parametrize("seed", range(3))
def test_victims_equal_a_search_over_all_blocks(capacity: int, seed: int) -> None:
    fast = Gittins(capacity)
    slow = SlowGittins(fast, capacity)
    driver = Driver([fast, slow], capacity, seed, num_keys=3 * capacity)
    for _ in range(1500):
        driver.step()
        driver.victim()
    assert driver.num_evictions > 50


def test_blocks_of_a_class_that_comes_back_outlive_those_of_one_that_never_does() -> None:
    policy = Gittins(200)
    rng = random.Random(1)
    block, number = 0, 1000
    there: dict[int, int] = {}
    free = list(range(200))
    for _ in range(4000):
        again = rng.random() < 0.5
        wanted = rng.randrange(120) if again else (number := number + 1)
        if wanted in there:
            policy.touch(there[wanted])
            continue
        policy.on_miss(key(wanted))
        if not free:
            victim = policy.victim()
            assert victim is not None
            policy.remove(victim, True)
            there = {each: at for each, at in there.items() if at != victim}
            free.append(victim)
        block = free.pop()
        there[wanted] = block
        policy.insert(block, key(wanted), INFO)
    assert sum(each < 120 for each in there) >= 115


def test_uses_of_an_evicted_block_are_remembered() -> None:
    policy = Gittins(4)
    policy.insert(0, key(0), INFO)
    for _ in range(9):
        policy.touch(0)
    policy.remove(0, True)
    for block in range(4):
        policy.insert(block, key(block), INFO)
    assert {policy.victim() for _ in range(2)} != {0}
    for block in (1, 2, 3):
        assert policy.victim() == block
        policy.remove(block, True)


def test_uses_of_a_purged_block_are_forgotten() -> None:
    policy = Gittins(4)
    policy.insert(0, key(0), INFO)
    for _ in range(9):
        policy.touch(0)
    policy.remove(0, False)
    for block in range(4):
        policy.insert(block, key(block), INFO)
    assert policy.victim() == 0


class TestReuseLearner:
    def test_ages_fall_into_buckets_in_ascending_order(self) -> None:
        learner = ReuseLearner(1000, [1.0], [0])
        assert list(learner.edges) == sorted(set(learner.edges))
        assert learner.edges[0] == 500
        assert learner.edges[-1] == 8000
        assert [learner.bucket(age) for age in (0, 499, 500, 8000)] == [0, 0, 1, len(learner.edges)]

    @pytest.mark.parametrize("capacity", [1, 2, 3, 7])
    def test_edges_of_a_tiny_cache_differ(self, capacity: int) -> None:
        learner = ReuseLearner(capacity, [1.0], [0])
        assert len(set(learner.edges)) == len(learner.edges)
        assert all(value > 0 for row in learner.refresh(1) for value in row)

    def test_a_class_that_is_used_again_gets_the_higher_index(self) -> None:
        learner = ReuseLearner(100, [1.0, 1.0], [0, 1])
        now = 0
        for round_ in range(200):
            for each in range(20):
                now += 1
                learner.record(key(each), now, 0)
            for each in range(20):
                now += 1
                learner.record(key(1000 + round_ * 20 + each), now, 1)
            learner.advance(now)
        again, once = learner.refresh(now)
        assert min(again[:3]) > 4 * max(once)

    def test_memory_is_bounded_by_the_ages_that_are_followed(self) -> None:
        learner = ReuseLearner(50, [1.0], [0])
        for now in range(1, 20_000):
            learner.record(key(now), now, 0)
            if now % 10 == 0:
                learner.advance(now)
        assert len(learner._log) <= 50 * 8 + 20
        assert len(learner._latest) <= 50 * 8 + 20

    def test_of_a_large_cache_a_sample_of_the_keys_is_followed(self) -> None:
        learner = ReuseLearner(2048 * 64, [1.0], [0])
        for now in range(1, 20_000):
            learner.record(key(now), now, 0)
        assert 100 < len(learner._log) < 700
