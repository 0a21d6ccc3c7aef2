"""The invariants of the prefix cache under random operations, for every policy, and a suite that catches broken caches.

Promise of each broken cache's name: the invariant that it breaks; `exercise` must notice within a few seeds.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pagemill.base.errors import CapacityError, IntegrityError
from pagemill.cache.policies.registry import POLICIES
from tests.contracts.cache.broken import BROKEN
from tests.contracts.cache.exercise import exercise
from tests.contracts.cache.harness import Harness, ViolationError

SIZES = [3, 6, 12, 30]


@pytest.mark.parametrize("policy", sorted(POLICIES))
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
        exercise(Harness(num_blocks=SIZES[seed % len(SIZES)], plain=seed % 3 == 0), seed, 120)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda each: each.__name__)
def test_a_broken_cache_is_caught(
    broken: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch)
    with pytest.raises((ViolationError, AssertionError, IntegrityError, CapacityError, KeyError)):
        exercise_seeds(40)
