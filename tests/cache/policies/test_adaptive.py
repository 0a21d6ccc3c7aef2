from __future__ import annotations

import pytest

from pagemill.cache.policies.adaptive import Adaptive
from pagemill.cache.policies.base import BlockInfo
from pagemill.cache.policies.lfu import LFU
from pagemill.cache.policies.lru import LRU
from pagemill.simulator.replay import replay
from pagemill.simulator.workload import GENERATORS, generate

INFO = BlockInfo(num_tokens=16)


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


@pytest.mark.parametrize("load", GENERATORS)
@pytest.mark.parametrize("capacity", [300, 1500])
def test_adaptive_stays_with_lru_or_above(load: str, capacity: int) -> None:
    trace = generate(load, 800, seed=7)
    adaptive = replay(trace, Adaptive(capacity), capacity)
    lru = replay(trace, LRU(capacity), capacity)
    assert adaptive.block_hit_ratio >= lru.block_hit_ratio - 0.003


def test_the_leader_changes_when_the_load_does() -> None:
    policy = Adaptive(60, (LRU, LFU))
    where: dict[int, int] = {}
    free = list(range(60))

    def use(number: int) -> None:
        if number in where:
            policy.touch(where[number])
            return
        policy.on_miss(key(number))
        if not free:
            victim = policy.victim()
            assert victim is not None
            policy.remove(victim, True)
            where.pop(next(each for each, at in where.items() if at == victim))
            free.append(victim)
        where[number] = free.pop()
        policy.insert(where[number], key(number), INFO)

    leaders = []
    for number in range(200):
        use(number % 40)
    for number in range(15_000):
        # Forty keys again and again between keys that come once: a count keeps them, recency loses them.
        use(number // 2 % 40 if number % 2 else 10_000 + number)
        if number % 2 == 0:
            use(50_000 + number)
    leaders.append(policy.leader)
    for number in range(30_000):
        # A window that moves: recency keeps it, old counts are in the way.
        use(200_000 + number // 40 + number % 30)
    leaders.append(policy.leader)
    assert leaders == ["lfu", "lru"]


def test_a_candidate_that_is_followed_late_knows_every_block() -> None:
    policy = Adaptive(8, (LRU, LFU))
    for block in range(8):
        policy.insert(block, key(block), INFO)
    policy.lock(0)
    policy.touch(1)
    policy.remove(2, True)
    policy._leader = 1
    order = []
    while (block := policy.victim()) is not None:
        order.append(block)
        policy.remove(block, True)
    assert order == [3, 4, 5, 6, 7, 1]
