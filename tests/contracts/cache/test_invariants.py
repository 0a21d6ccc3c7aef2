"""The invariants of the prefix cache under random operations, for every policy, and a suite that catches broken caches.

Of each broken cache `exercise` must say within a few seeds which promise it breaks, before the product falls over it.
"""

from __future__ import annotations

import pytest

from tests.contracts.cache.broken import BESIDE, BROKEN, MESSAGES, UNTESTED, Broken
from tests.contracts.cache.exercise import exercise
from tests.contracts.cache.harness import Harness
from tests.contracts.cache.slow_index import ViolationError
from tests.fixtures.policy_makers import EVERY_POLICY

SIZES = [3, 6, 12, 30]


@pytest.mark.parametrize("policy", EVERY_POLICY)
def test_random_operations_break_no_invariant(policy: str) -> None:
    num_hit = num_operations = 0
    for seed in range(12):
        harness = Harness(num_blocks=SIZES[seed % len(SIZES)], policy=policy)
        exercise(harness, seed, 120)
        num_hit += harness.num_hit
        num_operations += harness.num_operations
    assert num_operations > 1000
    assert num_hit > 50


@pytest.mark.parametrize("seed", range(4))
def test_victims_leave_in_the_order_of_a_slow_model(seed: int) -> None:
    harness = Harness(num_blocks=SIZES[seed], plain=True)
    exercise(harness, seed, 300)
    assert harness.num_evicted > 20


@pytest.mark.parametrize("seed", range(6))
def test_quotas_hold_under_random_operations(seed: int) -> None:
    harness = Harness(num_blocks=14)
    assert harness.cache.shared is not None
    harness.cache.shared.set_quota("a", 4, None)
    harness.cache.shared.set_quota("b", 0, 6)
    exercise(harness, seed, 150)


def exercise_seeds(count: int) -> None:
    for seed in range(count):
        plain = seed % 3 == 0
        exercise(Harness(num_blocks=SIZES[seed % len(SIZES)], plain=plain), seed, 300 if plain else 120)


CAUGHT = [(MESSAGES[number], each) for number, found in BROKEN.items() for each in found]
CAUGHT += [(message, each) for message, found in BESIDE.items() for each in found]


@pytest.mark.parametrize(("message", "broken"), CAUGHT, ids=[each.__name__ for _, each in CAUGHT])
def test_a_broken_cache_is_caught(message: str, broken: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch)
    with pytest.raises(ViolationError, match=message):
        exercise_seeds(40)


def test_each_invariant_has_a_broken_cache_or_a_reason() -> None:
    assert all(BROKEN.values())
    assert not BROKEN.keys() & UNTESTED.keys()
    assert BROKEN.keys() | UNTESTED.keys() == set(range(1, 13))
