"""Whose turn it is: service by weight, no credit for idling, bounded memory."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagemill.base.errors import ConfigError
from pagemill.engine.fairness import MOST_GRANTED, Share, Shares
from tests.fixtures.queued import sequence


def active(shares: Shares, *names: str) -> list[Share]:
    """Parts with one sequence waiting each."""
    found = [shares.of(name) for name in names]
    for seq_id, share in enumerate(found, 1):
        share.queue.add(sequence(seq_id))
    return found


def turns(shares: Shares, count: int, cost: int = 10) -> Counter[str]:
    """How often each waiting tenant was next, when whoever is gets `cost` prompt tokens computed."""
    taken: Counter[str] = Counter()
    for _ in range(count):
        share = shares.waiting()[0]
        shares.charge(share, cost, 0)
        taken[share.name] += 1
    return taken


def test_equal_weights_take_turns() -> None:
    shares = Shares()
    active(shares, "a", "b", "c")
    assert set(turns(shares, 30).values()) == {10}


def test_weights_divide_the_service() -> None:
    shares = Shares()
    shares.grant("a", weight=3)
    active(shares, "a", "b")
    assert turns(shares, 400) == {"a": 300, "b": 100}


def test_a_unit_of_priority_counts_as_four_times_the_weight() -> None:
    shares = Shares()
    shares.grant("first", priority=-1)
    active(shares, "first", "other")
    assert turns(shares, 100) == {"first": 80, "other": 20}


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=6), st.lists(st.integers(1, 100), min_size=50, max_size=200))
def test_nobody_is_ever_further_behind_than_the_largest_turns(weights: list[float], costs: list[int]) -> None:
    shares = Shares()
    for index, weight in enumerate(weights):
        shares.grant(str(index), weight)
    parts = active(shares, *map(str, range(len(weights))))
    for cost in costs:
        shares.charge(shares.waiting()[0], cost, 0)
    services = [share.service for share in parts]
    assert max(services) - min(services) <= max(costs) / min(weights) + 1e-6


def test_whoever_comes_back_starts_with_those_who_stayed() -> None:
    shares = Shares()
    [stays] = active(shares, "stays")
    shares.charge(stays, 1000, 0)
    [new] = active(shares, "new")
    assert new.service == stays.service, "idling earns nothing"
    shares.charge(new, 500, 0)
    new.queue.remove(new.queue.first(1)[0])
    shares.rest(new)
    assert shares.of("new").service == stays.service + 500, "and leaving forgives nothing"


def test_all_is_forgiven_when_nobody_is_left() -> None:
    shares = Shares()
    [only] = active(shares, "only")
    shares.charge(only, 10, 10)
    assert only.service == 10 + 2 * 10
    only.queue.remove(only.queue.first(1)[0])
    shares.rest(only)
    assert (shares.num_known, shares.of("only").service) == (0, 0.0)


def test_memory_is_bounded_whatever_names_come() -> None:
    shares = Shares()
    active(shares, "stays")
    for index in range(10_000):
        share = shares.of(f"passes {index}")
        shares.rest(share)
    assert shares.num_known <= 20


def test_part_of_places_follows_weight_and_is_never_none() -> None:
    shares = Shares()
    shares.grant("large", weight=98)
    large, small = active(shares, "large", "small")
    assert shares.fair(large, 50) == pytest.approx(50 * 98 / 99)
    assert shares.fair(small, 50) == 1.0


def test_only_who_has_more_than_its_part_can_be_displaced_and_only_for_less() -> None:
    shares = Shares()
    flood, victim = active(shares, "flood", "victim")
    flood.num_running = 8
    assert shares.above_fair(victim, 8) is flood
    flood.num_running, victim.num_running = 4, 4
    assert shares.above_fair(victim, 8) is None
    flood.num_running, victim.num_running = 5, 3
    assert shares.above_fair(victim, 8) is flood
    assert shares.above_fair(flood, 8) is None


@pytest.mark.parametrize(("weight", "priority"), [(0, 0), (-1, 0), (1e7, 0), (float("nan"), 0), (1, MOST_GRANTED + 1)])
def test_grants_out_of_range_are_refused(weight: float, priority: int) -> None:
    with pytest.raises(ConfigError, match="tenant 't': weight is"):
        Shares().grant("t", weight, priority)


def test_a_grant_holds_for_a_tenant_that_is_active() -> None:
    shares = Shares()
    [share] = active(shares, "t")
    shares.grant("t", 2)
    assert share.weight == 2
