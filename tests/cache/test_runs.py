"""Runs of blocks that come and go at once do what the same blocks do one by one."""

from __future__ import annotations

from random import Random

import pytest

from pagemill.cache.policies.base import BlockInfo, OneByOne
from pagemill.cache.policies.registry import POLICIES, make_policy


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_runs_are_admitted_and_evicted_as_one_by_one(name: str) -> None:
    random, at_once, singly = Random(name), make_policy(name, 60), make_policy(name, 60)
    known: list[int] = []
    number = 0
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
            victim = at_once.evict()
            assert victim == OneByOne.evict(singly)
            assert victim is not None
            known.remove(victim)
    assert at_once.victim() == singly.victim()


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_nothing_is_evicted_where_all_is_locked(name: str) -> None:
    policy = make_policy(name, 8)
    policy.admit([3, 1], [b"a" * 32, b"b" * 32], [BlockInfo(), BlockInfo()])
    assert policy.evict() is None
    policy.unlock(1)
    assert policy.evict() == 1
    assert 1 not in policy
    assert 3 in policy


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_run_with_a_known_block_is_refused_and_changes_nothing(name: str) -> None:
    policy = make_policy(name, 8)
    policy.insert(1, b"a" * 32, BlockInfo())
    with pytest.raises(AssertionError):
        policy.admit([2, 1], [b"b" * 32, b"c" * 32], [BlockInfo(), BlockInfo()])
    assert 2 not in policy
    assert policy.victim() == 1
