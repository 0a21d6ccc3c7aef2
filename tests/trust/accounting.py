"""R5: random operations on a cache against a slow model; blocks are conserved after each, and none is left at the end.

Open, compute, extend, roll back, draft, share, fork, close (or abort), preempt and resume, pin, unpin, purge by text,
prefix, namespace and tenant, resize, quotas, time. Every fourth cache has window groups beside, whose pages are
accounted for and re-read in the same way. What is offloaded and restored joins with the colder tiers.
"""

from __future__ import annotations

from tests.contracts.cache.exercise import exercise
from tests.contracts.cache.harness import Harness
from tests.contracts.cache.windowed import WindowedHarness
from tests.fixtures.policy_makers import SHIPPED
from tests.trust.figures import Figure

SIZES = (3, 6, 12, 30)
STEPS = 220


def harness_of(seed: int) -> Harness:
    """Every fourth with window groups; of the others every third in plain least-recently-used order, where the slow
    model also says who is evicted."""
    if seed % 4 == 3:
        policy = SHIPPED[seed // 4 % len(SHIPPED)]
        return WindowedHarness(
            num_blocks=SIZES[seed // 4 % len(SIZES)], num_pages=(9, 14)[seed // 4 % 2], policy=policy
        )
    plain = seed % 3 == 0
    policy = "native lru" if plain else SHIPPED[seed // 3 % len(SHIPPED)]
    return Harness(num_blocks=SIZES[seed % len(SIZES)], policy=policy, plain=plain)


def replay(seed: int) -> None:
    """One seed; raises what it finds."""
    exercise(harness_of(seed), seed, STEPS)


def count(seeds: range) -> Figure:
    """Seeds until there are none, counting operations and what the cache met."""
    num_operations = num_evicted = num_hit = num_windowed = 0
    replays = []
    for seed in seeds:
        harness = harness_of(seed)
        try:
            exercise(harness, seed, STEPS)
        except Exception as error:
            replays.append(f"python scripts/trust.py --replay R5:{seed}  # {type(error).__name__}: {error}")
        num_operations += harness.num_operations
        num_evicted += harness.num_evicted
        num_hit += harness.num_hit
        num_windowed += harness.num_operations * isinstance(harness, WindowedHarness)
    also = {"evictions": num_evicted, "tokens hit": num_hit, "operations with windows": num_windowed}
    return Figure("R5", "leaks, double frees or divergences", len(replays), num_operations, "operations", also, replays)
