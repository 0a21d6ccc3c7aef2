"""Runs of blocks that come and go at once do what the same blocks do one by one."""

from __future__ import annotations

from random import Random

import pytest

from pagemill.cache.policies.base import BlockInfo, OneByOne
from tests.fixtures.policy_makers import EVERY_POLICY, make_policy


@pytest.mark.parametrize("name", EVERY_POLICY)
def test_runs_are_admitted_and_evicted_as_one_by_one(name: str) -> None:
    random, at_once, singly = Random(name), make_policy(name, 60), make_policy(name, 60)
    known: list[int] = []
    number = num_runs = 0
    for _ in range(120):
        run = range(number, number + random.randrange(1, 6))
        number = run.stop
        keys, infos = [b"%032d" % (each % 90) for each in run], [BlockInfo(16, at) for at in range(len(run))]
        at_once.admit(run, keys, infos)
        OneByOne.admit(singly, run, keys, infos)
        known += run
        for block in run:
            at_once.unlock(block)
            singly.unlock(block)
        for block in random.sample(known, min(len(known), 4)):
            at_once.touch(block)
            singly.touch(block)
        while len(known) > 40:
            victim = at_once.victim()
            assert victim is not None
            behind = [each for each in range(victim - 1, victim - 4, -1) if each in known]
            if random.random() < 0.3:
                behind = random.sample([each for each in known if each != victim], 3)
            for block in behind:
                at_once.lock(block)
                singly.lock(block)
            leaving = [victim, *behind]
            count = at_once.evict_run(leaving)
            assert count == OneByOne.evict_run(singly, leaving)
            num_runs += count > 1
            for block in leaving[count + 1 :]:
                at_once.unlock(block)
                singly.unlock(block)
            known = [each for each in known if each not in leaving[:count]]
    assert at_once.victim() == singly.victim()
    assert num_runs > 5


@pytest.mark.parametrize("name", EVERY_POLICY)
def test_nothing_is_evicted_where_all_is_locked(name: str) -> None:
    policy = make_policy(name, 8)
    policy.admit([3, 1], [b"a" * 32, b"b" * 32], [BlockInfo(), BlockInfo()])
    assert policy.victim() is None
    policy.unlock(1)
    with pytest.raises(AssertionError):
        policy.evict_run([3, 1])
    assert 3 in policy
    assert policy.evict_run([1, 3]) == 2
    assert 1 not in policy
    assert 3 not in policy


@pytest.mark.parametrize("name", EVERY_POLICY)
def test_a_run_ends_where_another_block_is_the_victim(name: str) -> None:
    policy = make_policy(name, 8)
    for block in (1, 5, 2):
        policy.insert(block, b"%032d" % block, BlockInfo())
    policy.lock(2)
    assert policy.victim() == 1
    assert policy.evict_run([1, 2]) == 1
    assert policy.victim() == 5
    policy.remove(5, True)
    assert policy.victim() == 2, "it is unlocked"


@pytest.mark.parametrize("name", EVERY_POLICY)
def test_a_run_with_a_known_block_is_refused_and_changes_nothing(name: str) -> None:
    policy = make_policy(name, 8)
    policy.insert(1, b"a" * 32, BlockInfo())
    with pytest.raises(AssertionError):
        policy.admit([2, 1], [b"b" * 32, b"c" * 32], [BlockInfo(), BlockInfo()])
    assert 2 not in policy
    assert policy.victim() == 1
