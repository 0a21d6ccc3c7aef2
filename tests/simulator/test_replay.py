from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from pagemill.base.errors import ConfigError
from pagemill.simulator.replay import prepare, replay, replay_ideal, replay_lru, replay_manager, replay_optimum
from pagemill.simulator.trace import Request, Trace, read_trace
from pagemill.simulator.workload import GENERATORS, generate
from tests.fixtures.policy_makers import EVERY_POLICY, make_policy

STORED = Path(__file__).parent / "traces"
# Hits and evictions by stored trace, policy and capacity. The conversations show adaptive that it does best to stay
# with its first candidate, lru; the documents, `generate("documents", 200, seed=1)` with its blocks renumbered in order
# of appearance, that it must leave it.
GOLDEN: dict[tuple[str, str, int], tuple[int, int]] = {
    ("chat", "lru", 400): (1103, 3556),
    ("chat", "lru", 1000): (1404, 2652),
    ("chat", "lfu", 400): (1118, 3541),
    ("chat", "lfu", 1000): (1367, 2689),
    ("chat", "s3fifo", 400): (1118, 3541),
    ("chat", "s3fifo", 1000): (1409, 2622),
    ("chat", "arc", 400): (1118, 3541),
    ("chat", "arc", 1000): (1359, 2697),
    ("chat", "gdsf", 400): (1118, 3565),
    ("chat", "gdsf", 1000): (1391, 2673),
    ("chat", "gittins", 400): (1153, 3542),
    ("chat", "gittins", 1000): (1387, 2678),
    ("chat", "adaptive", 400): (1103, 3556),
    ("chat", "adaptive", 1000): (1404, 2652),
    ("documents", "lru", 60): (269, 5000),
    ("documents", "lru", 300): (924, 4088),
    ("documents", "lfu", 60): (171, 5120),
    ("documents", "lfu", 300): (1066, 3992),
    ("documents", "s3fifo", 60): (211, 4928),
    ("documents", "s3fifo", 300): (1056, 3989),
    ("documents", "arc", 60): (289, 4985),
    ("documents", "arc", 300): (1200, 3800),
    ("documents", "gdsf", 60): (278, 4976),
    ("documents", "gdsf", 300): (1197, 3824),
    ("documents", "gittins", 60): (580, 4739),
    ("documents", "gittins", 300): (1180, 3839),
    ("documents", "adaptive", 60): (531, 4784),
    ("documents", "adaptive", 300): (1015, 3992),
}
GOLDEN_OPTIMUM = [1176, 1705]
GOLDEN_IDEAL = 1705


def trace_of(*chains: str) -> Trace:
    """A request for each text, a block for each letter."""
    return Trace("letters", 1, tuple(Request(0.0, len(chain), 0, tuple(map(ord, chain))) for chain in chains))


def test_hits_are_the_leading_run_of_present_blocks() -> None:
    done = replay(trace_of("abcd", "abxd", "bcd"), make_policy("lru", 10), 10)
    assert (done.num_hits, done.num_accesses) == (2 + 3, 11)


def test_of_a_chain_the_last_blocks_leave_first() -> None:
    done = replay(trace_of("abc", "z", "abc"), make_policy("lru", 3), 3)
    assert done.num_hits == 2


def test_the_second_half_is_counted_apart() -> None:
    done = replay(trace_of("ab", "cd", "ab", "cx"), make_policy("lru", 10), 10)
    assert (done.block_hit_ratio, done.later_hit_ratio) == (3 / 8, 3 / 4)


@pytest.fixture(scope="module")
def stored() -> dict[str, Trace]:
    return {name: read_trace(STORED / f"{name}.jsonl") for name in ("chat", "documents")}


@pytest.mark.parametrize("name", EVERY_POLICY)
@pytest.mark.parametrize(("load", "capacity"), [("chat", 400), ("chat", 1000), ("documents", 60), ("documents", 300)])
def test_golden_counts_of_the_stored_traces(stored: dict[str, Trace], load: str, capacity: int, name: str) -> None:
    done = replay(stored[load], make_policy(name, capacity), capacity)
    assert (done.num_hits, done.num_evictions) == GOLDEN[load, name.split()[-1], capacity]


@pytest.mark.parametrize("name", ["adaptive", "native adaptive"])
@pytest.mark.parametrize("capacity", [60, 300])
def test_adaptive_leaves_lru_where_another_hits_more(stored: dict[str, Trace], capacity: int, name: str) -> None:
    policy: Any = make_policy(name, capacity)
    assert policy.leader == "lru"
    done = replay(stored["documents"], policy, capacity)
    assert policy.leader == "gittins"
    assert done.num_hits > GOLDEN["documents", "lru", capacity][0]


def test_golden_counts_of_the_bounds(stored: dict[str, Trace]) -> None:
    trace = stored["chat"]
    assert [replay_optimum(trace, capacity).num_hits for capacity in (40, 400)] == GOLDEN_OPTIMUM
    assert replay_ideal(trace).num_hits == GOLDEN_IDEAL


@pytest.mark.parametrize("load", GENERATORS)
@pytest.mark.parametrize("capacity", [1, 50, 700])
def test_the_quick_lru_counts_what_the_policy_counts(load: str, capacity: int) -> None:
    trace = generate(load, 150, seed=3)
    assert replay_lru(trace, capacity) == replay(trace, make_policy("lru", capacity), capacity)


@pytest.mark.parametrize("policy", ["lru", "s3fifo", "gdsf", "gittins"])
@pytest.mark.parametrize("load", ["chat", "agents"])
def test_no_policy_passes_the_bounds(load: str, policy: str) -> None:
    trace = generate(load, 200, seed=5)
    done = replay(trace, make_policy(policy, 300), 300)
    assert done.num_hits <= replay_optimum(trace, 300).num_hits <= replay_ideal(trace).num_hits


def best_by_search(chain: str, capacity: int) -> int:
    """Hits of the best choice of victims for single-block requests, by trying them all."""
    states = {frozenset[str](): 0}
    for each in chain:
        following: dict[frozenset[str], int] = {}
        for held, hits in states.items():
            options = [held] if each in held else [held, *((held - {out}) | {each} for out in held)]
            if each not in held and len(held) < capacity:
                options = [held | {each}]
            for option in options:
                following[option] = max(following.get(option, 0), hits + (each in held))
        states = following
    return max(states.values())


@pytest.mark.parametrize("chain", ["".join(each) * 2 for each in list(permutations("aabcd"))[::7]])
def test_the_optimum_is_what_trying_everything_finds(chain: str) -> None:
    assert replay_optimum(trace_of(*chain), 2).num_hits == best_by_search(chain, 2)


def test_a_cache_with_room_for_everything_is_ideal() -> None:
    trace = generate("chat", 150, seed=2)
    for name in EVERY_POLICY:
        capacity = trace.num_distinct
        assert replay(trace, make_policy(name, capacity), capacity).num_hits == replay_ideal(trace).num_hits


def test_the_cache_manager_with_lru_hits_what_the_bare_policy_hits() -> None:
    trace = generate("chat", 200, seed=4)
    assert replay_manager(trace, "lru", 700).num_hits == replay_lru(trace, 700).num_hits


def test_the_cache_manager_counts_what_it_evicts() -> None:
    done = replay_manager(trace_of("abc", "de", "abf"), "lru", 4)
    assert (done.num_hits, done.num_evictions) == (2, 2), "c makes room for e, e for f"


def test_the_cache_manager_refuses_nothing_of_a_request_longer_than_the_cache() -> None:
    done = replay_manager(trace_of("abcdef", "ab", "ab"), "lru", 3)
    assert (done.num_hits, done.num_accesses) == (2, 10)


def test_a_request_that_names_a_block_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="request 1 names a block twice"):
        replay(trace_of("abc", "aba"), make_policy("lru", 3), 3)


def test_a_trace_prepared_once_serves_every_policy_and_size() -> None:
    trace = generate("shifting", 120, seed=1)
    prepared = prepare(trace)
    for name, capacity in (("lru", 50), ("gittins", 50), ("native gittins", 50), ("lru", 400)):
        assert replay(trace, make_policy(name, capacity), capacity, prepared) == replay(
            trace, make_policy(name, capacity), capacity
        )


def test_a_trace_of_lengths_alone_is_refused() -> None:
    lengths = Trace("lengths.csv", 0, (Request(0.0, 5, 5, ()),))
    with pytest.raises(ConfigError, match="no block ids"):
        replay(lengths, make_policy("lru", 3), 3)
