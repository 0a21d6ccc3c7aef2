from __future__ import annotations

from collections.abc import Callable

import pytest

from pagemill.cache.policies.adaptive import Adaptive, _Shadow
from pagemill.cache.policies.base import BlockInfo, Policy
from pagemill.cache.policies.gittins import Gittins
from pagemill.cache.policies.lfu import LFU
from pagemill.cache.policies.lru import LRU
from pagemill.simulator.replay import prepare, replay, replay_lru
from pagemill.simulator.workload import GENERATORS, generate

INFO = BlockInfo(num_tokens=16)


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


def use(policy: Policy, number: int, where: dict[int, int], free: list[int]) -> None:
    """A single block in a cache of blocks `free`. where: the blocks by number."""
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


@pytest.mark.parametrize("load", GENERATORS)
@pytest.mark.parametrize("capacity", [300, 1500])
def test_adaptive_stays_with_lru_or_above(load: str, capacity: int) -> None:
    trace = generate(load, 800, seed=7)
    adaptive = replay(trace, Adaptive(capacity), capacity)
    lru = replay(trace, LRU(capacity), capacity)
    assert adaptive.block_hit_ratio >= lru.block_hit_ratio - 0.003


@pytest.mark.parametrize("seed", [3])
def test_what_was_over_before_it_could_be_followed_is_not_followed(seed: int) -> None:
    trace = generate("shifting", 3000, seed)
    done = replay(trace, Adaptive(2930), 2930)
    assert done.block_hit_ratio >= replay_lru(trace, 2930).block_hit_ratio - 0.003


def test_the_first_candidate_leads_again_once_following_another_has_cost_its_share() -> None:
    policy = Adaptive(60, (LRU, LFU))
    policy._leader = 1
    where: dict[int, int] = {}
    free = list(range(60))
    lost = []
    for number in range(6000):
        # A window that moves: recency keeps it, old counts are in the way. The counts of the shadows never say so.
        policy._gains = [0.0, 100.0]
        use(policy, number if number < 600 else 200_000 + number // 40 + number % 30, where, free)
        lost.append((policy.leader, policy._balance))
    assert lost[599][0] == "lfu"
    assert lost[-1][0] == "lru"
    assert -0.05 * len(lost) < lost[-1][1] < -0.001 * len(lost) / 2


@pytest.mark.parametrize("maker", [LRU, LFU, Gittins])
def test_a_shadow_hits_chains_as_a_cache_does(maker: Callable[[int], Policy]) -> None:
    trace = prepare(generate("chat", 150, seed=6))
    shadow, policy = _Shadow(maker(200), 200), maker(200)
    there: set[int] = set()
    for chain in trace.chains:
        num_hits = 0
        for block, each, info in zip(chain.blocks, chain.keys, chain.infos[0], strict=True):
            num_hits = num_hits + 1 if block in there else 0
            if block in there:
                policy.touch(block)
                continue
            policy.on_miss(each)
            if len(there) == 200:
                victim = policy.victim()
                assert victim is not None
                policy.remove(victim, True)
                there.remove(victim)
            policy.insert(block, each, info)
            there.add(block)
        assert shadow.use(chain.keys, chain.infos[0]) == num_hits


def test_the_leader_changes_when_the_load_does() -> None:
    policy = Adaptive(60, (LRU, LFU))
    where: dict[int, int] = {}
    free = list(range(60))
    leaders = []
    for number in range(200):
        use(policy, number % 40, where, free)
    for number in range(15_000):
        # Forty keys again and again between keys that come once: a count keeps them, recency loses them.
        use(policy, number // 2 % 40 if number % 2 else 10_000 + number, where, free)
        if number % 2 == 0:
            use(policy, 50_000 + number, where, free)
    leaders.append(policy.leader)
    for number in range(30_000):
        # A window that moves: recency keeps it, old counts are in the way.
        use(policy, 200_000 + number // 40 + number % 30, where, free)
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
    while (victim := policy.victim()) is not None:
        order.append(victim)
        policy.remove(victim, True)
    assert order == [3, 4, 5, 6, 7, 1]
