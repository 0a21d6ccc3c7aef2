from __future__ import annotations

import random

import pytest

from pagemill.cache.policies.base import BlockInfo
from pagemill.cache.policies.gittins import Gittins
from pagemill.cache.policies.reuse import LearnerSetting, ReuseLearner
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
        kind = fast._entries[block][2]
        age = fast._epoch - each.used // fast._epoch_uses
        bucket = sum(edge <= age for edge in fast._learner.edges)
        return (fast._places[kind * fast._buckets + bucket], each.used)


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


def test_of_blocks_used_once_those_of_short_texts_outlive_those_of_long_ones_at_first() -> None:
    policy = Gittins(4)
    for block, text_tokens in enumerate((1000, 100_000, 1000, 10_000)):
        policy.insert(block, key(block), BlockInfo(16, text_tokens=text_tokens))
    order = []
    while (block_ := policy.victim()) is not None:
        order.append(block_)
        policy.remove(block_, True)
    assert order == [1, 3, 0, 2]


def test_a_block_that_went_on_from_a_known_text_leaves_before_one_of_a_new_text() -> None:
    policy = Gittins(2)
    policy.insert(0, key(0), BlockInfo(16, text_tokens=1000))
    policy.insert(1, key(1), BlockInfo(16, text_tokens=1000, num_known_blocks=5))
    assert policy.victim() == 1


@pytest.mark.parametrize("capacity", [3, 12, 40, 200])
def test_after_a_resize_the_order_is_that_of_a_search_over_all_blocks(capacity: int) -> None:
    fast = Gittins(capacity)
    slow = SlowGittins(fast, capacity)
    driver = Driver([fast, slow], capacity, 5, num_keys=3 * capacity)
    for size in (capacity, 2 * capacity, 1, 7 * capacity):
        fast.resize(size)
        for _ in range(400):
            driver.step()
            driver.victim()


class TestReuseLearner:
    def test_ages_fall_into_buckets_in_ascending_order(self) -> None:
        learner = ReuseLearner(1600, [1.0], [0], LearnerSetting(first_edge=0.5, num_edges=9))
        assert learner.epoch_uses == 100
        assert list(learner.edges) == sorted(set(learner.edges))
        assert learner.edges[0] == 8
        assert learner.edges[-1] == 128
        assert [learner.bucket(age) for age in (0, 7, 8, 128)] == [0, 0, 1, len(learner.edges)]

    @pytest.mark.parametrize("capacity", [1, 2, 3, 7])
    @pytest.mark.parametrize("first_edge", [0.01, 0.5])
    def test_edges_of_a_tiny_cache_differ(self, capacity: int, first_edge: float) -> None:
        learner = ReuseLearner(capacity, [1.0], [0], LearnerSetting(first_edge=first_edge))
        assert len(set(learner.edges)) == len(learner.edges)
        assert all(value > 0 for row in learner.refresh(1) for value in row)

    def test_a_class_that_is_used_again_gets_the_higher_index(self) -> None:
        learner = ReuseLearner(100, [1.0, 1.0], [0, 1], LearnerSetting(shape_weight=1000.0, level_weight=100.0))
        for epoch in range(200):
            learner.advance(epoch)
            for each in range(20):
                learner.record(key(each), epoch, 0)
                learner.record(key(1000 + epoch * 20 + each), epoch, 1)
        again, once = learner.refresh(200)
        assert all(one > 4 * other for one, other in zip(again[:3], once[:3], strict=True))

    def test_counts_outlive_a_change_of_capacity(self) -> None:
        learners = [ReuseLearner(100 * size, [1.0, 1.0], [0, 1]) for size in (1, 2, 2)]
        for epoch in range(2000):
            learners[0].advance(epoch)
            learners[0].record(key(1), epoch, 0)
            learners[0].record(key(1000 + epoch), epoch, 1)
        learners[1].take_over(learners[0], 0)
        (again, once), (plain, other) = learners[1].refresh(0), learners[2].refresh(0)
        assert plain == other
        assert again[0] > 1.2 * once[0] > 1.2 * plain[0]

    def test_memory_is_bounded_by_the_ages_that_are_followed(self) -> None:
        learner = ReuseLearner(50, [1.0], [0])
        for epoch in range(1000):
            learner.advance(epoch)
            for number in range(20):
                learner.record(key(epoch * 20 + number), epoch, 0)
        assert len(learner._latest) <= 20 * learner.edges[-1]
        assert len(learner._alive) == len(learner._keys) <= learner.edges[-1]

    @pytest.mark.parametrize(("capacity", "mask"), [(1, 0), (8191, 0), (8192, 1), (1 << 20, 255), (1 << 30, 255)])
    def test_of_a_large_cache_a_sample_of_the_keys_is_followed(self, capacity: int, mask: int) -> None:
        assert ReuseLearner(capacity, [1.0], [0]).mask == mask
