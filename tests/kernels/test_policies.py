"""The native eviction policies do what the Python ones do, call by call; hostile arguments change nothing."""

from __future__ import annotations

import copy
import dataclasses
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pagemill.cache.policies import registry
from pagemill.cache.policies.base import BlockInfo
from pagemill.cache.policies.gittins import GittinsSetting
from pagemill.kernels import _native
from pagemill.kernels.policies import POLICIES
from pagemill.simulator.replay import replay
from pagemill.simulator.workload import GENERATORS, generate
from tests.fixtures.policy_pairs import Both, Player, play_sizes

INFO = BlockInfo(num_tokens=16)
MOST_BLOCK = 1 << 62
every_policy = pytest.mark.parametrize("name", POLICIES)


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


def both(name: str, capacity: int) -> Both:
    return Both(registry.make_policy(name, capacity), POLICIES[name](capacity))


def filled(name: str, count: int) -> Any:
    policy = POLICIES[name](count)
    for block in range(count):
        policy.insert(block, key(block), INFO)
    return policy


def drain(policy: Any) -> list[int]:
    order = []
    while (block := policy.victim()) is not None:
        order.append(block)
        policy.remove(block, True)
    return order


def test_every_policy_is_there_in_both_forms() -> None:
    assert list(POLICIES) == list(registry.POLICIES)
    assert [maker(3).name for maker in POLICIES.values()] == list(POLICIES)


@every_policy
@pytest.mark.parametrize("locks", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("capacity", [1, 3, 20, 130, 900])
def test_random_calls_get_the_same_answers(name: str, capacity: int, locks: float) -> None:
    policy = both(name, capacity)
    keys = 4 * capacity + 10
    player = Player(policy, random.Random(capacity), capacity, keys, locks, resizes=locks != 0)
    for _ in range(1200):
        player.step()
    assert player.num_refused > 15
    if capacity in (20, 130):
        many = ["touch_all", "replace", "exchange", "admit", "evict_run"]
        calls = ["insert", "on_miss", "touch", "lock", "unlock", "remove", *many]
        assert min(player.num_calls.get(each, 0) for each in calls) > 2


@every_policy
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(source=st.randoms(), capacity=st.integers(1, 40), locks=st.sampled_from([0.0, 0.2, 0.6]))
def test_any_calls_get_the_same_answers(name: str, source: random.Random, capacity: int, locks: float) -> None:
    player = Player(both(name, capacity), source, capacity, 3 * capacity, locks)
    for _ in range(25):
        player.step()


@every_policy
@pytest.mark.parametrize("capacity", [40, 9000])
def test_the_order_of_all_blocks_is_the_same_after_many_calls(name: str, capacity: int) -> None:
    policy = both(name, capacity)
    player = Player(policy, random.Random(7), capacity, 4 * capacity, 0.2, resizes=False)
    for _ in range(1500):
        player.step()
    for block in sorted(player.locked):
        policy.unlock(block)
    assert len(drain(policy)) == len(player.there) > 20


@every_policy
@pytest.mark.parametrize("load", GENERATORS)
def test_replays_evict_the_same_blocks(name: str, load: str) -> None:
    trace = generate(load, 250, seed=4)
    replay(trace, both(name, 150), 150)


@pytest.mark.parametrize(("load", "capacity"), [("shifting", 60), ("agents", 300)])
def test_the_leader_changes_with_that_of_the_specification(load: str, capacity: int) -> None:
    policy = both("adaptive", capacity)
    replay(generate(load, 1500, seed=0), policy, capacity)
    assert len(policy.leaders) > 4


def test_a_large_cache_is_sampled_as_in_the_specification() -> None:
    # Of 9,000 blocks gittins samples every second key and adaptive every eighth one, over two epochs and more.
    trace = generate("chat", 1600, seed=9)
    for name in ("gittins", "adaptive"):
        replay(trace, both(name, 9000), 9000)


@pytest.mark.parametrize("seed", [0, 1, 3])
def test_resizes_that_change_the_sample_lead_to_the_same_policies(seed: int) -> None:
    # All keys are sampled below 2,048 blocks, one of 8 to 32 of 9,000 to 40,000.
    source = random.Random(seed)
    sizes = [source.randrange(*each) for each in ((300, 2048), (9000, 40_000), (500, 2048), (9000, 20_000))]
    policy = both("adaptive", sizes[0])
    assert min(play_sizes(policy, source, sizes)) > 0, "no leader changed, so that no difference could show"


def test_constants_are_those_of_the_specification() -> None:
    expected = dataclasses.asdict(GittinsSetting())
    assert expected.pop("gaps") == (), "native code has no classes by gaps"
    found = _native.gittins_constants()
    assert {each: tuple(v) if isinstance(v, list) else v for each, v in found.items()} == expected


@every_policy
def test_keys_of_every_length_differ(name: str) -> None:
    keys = [bytes(count) for count in range(1, 33)] + [b"\1" + bytes(count) for count in range(32)]
    policy = both(name, 100)
    for _ in range(3):
        for block, each in enumerate(keys):
            policy.on_miss(each)
            policy.insert(block, each, INFO)
        while (victim := policy.victim()) is not None:
            policy.remove(victim, True)


class Info:
    """Not a BlockInfo, with the same fields."""

    def __init__(self, **changed: Any) -> None:
        for each in dataclasses.fields(INFO):
            setattr(self, each.name, changed.get(each.name, getattr(INFO, each.name)))


HOSTILE: list[tuple[type[Exception] | tuple[type[Exception], ...], Callable[[Any], Any]]] = [
    (ValueError, lambda p: p.insert(-1, key(99), INFO)),
    (ValueError, lambda p: p.insert(MOST_BLOCK + 1, key(99), INFO)),
    (ValueError, lambda p: p.insert(1 << 70, key(99), INFO)),
    (ValueError, lambda p: p.touch(-(1 << 70))),
    (TypeError, lambda p: p.insert("50", key(99), INFO)),
    (TypeError, lambda p: p.insert(50.0, key(99), INFO)),
    (TypeError, lambda p: p.insert(None, key(99), INFO)),
    (ValueError, lambda p: p.insert(50, b"", INFO)),
    (ValueError, lambda p: p.insert(50, bytes(33), INFO)),
    (TypeError, lambda p: p.insert(50, "key", INFO)),
    (TypeError, lambda p: p.insert(50, bytearray(8), INFO)),
    (ValueError, lambda p: p.on_miss(b"")),
    (TypeError, lambda p: p.remove(2, 1)),
    (TypeError, lambda p: p.remove(2)),
    (TypeError, lambda p: p.touch_all(3)),
    (TypeError, lambda p: p.touch_all([1, "2"])),
    (ValueError, lambda p: p.touch_all([1, -2])),
    (ValueError, lambda p: p.replace([50, 51], [key(50)], [INFO, INFO])),
    (ValueError, lambda p: p.replace([50, 51], [key(50), key(51)], [INFO])),
    (ValueError, lambda p: p.replace([], [key(50)], [INFO])),
    (AssertionError, lambda p: p.replace([50, 50], [key(50), key(51)], [INFO, INFO])),
    (ValueError, lambda p: p.admit([50, 51], [key(50), b""], [INFO, INFO])),
    (AssertionError, lambda p: p.admit([50, 51, 50], [key(50)] * 3, [INFO] * 3)),
    (ValueError, lambda p: p.exchange([1], [50, 51], [key(50), key(51)], [INFO, INFO])),
    (AssertionError, lambda p: p.exchange([1, 1], [50, 51], [key(50), key(51)], [INFO, INFO])),
    (AssertionError, lambda p: p.exchange([51, 1], [50, 51], [key(50), key(51)], [INFO, INFO])),
    (AssertionError, lambda p: p.exchange([1, 2], [50, 50], [key(50), key(51)], [INFO, INFO])),
    (AssertionError, lambda p: p.evict_run([])),
    (AssertionError, lambda p: p.evict_run([p.victim(), p.victim()])),
    (AssertionError, lambda p: p.evict_run([p.victim(), 5, 5])),
    (AssertionError, lambda p: p.evict_run([p.victim(), 5, 6])),
    (AssertionError, lambda p: p.evict_run([p.victim(), 5, 99])),
    (AssertionError, lambda p: p.resize(0)),
    (AssertionError, lambda p: p.resize(-5)),
    (ValueError, lambda p: p.resize(1 << 62)),
    (ValueError, lambda p: p.resize(1 << 70)),
    (TypeError, lambda p: p.resize("5")),
]


@every_policy
@pytest.mark.parametrize("at", range(len(HOSTILE)))
def test_a_hostile_argument_is_refused_and_changes_nothing(name: str, at: int) -> None:
    error, call = HOSTILE[at]
    policy = filled(name, 12)
    for block in (3, 3, 8):
        policy.touch(block)
    policy.lock(5)
    untouched = copy.deepcopy(policy)
    with pytest.raises(error):
        call(policy)
    assert [50 in policy, 51 in policy] == [False, False]
    policy.unlock(5)
    untouched.unlock(5)
    assert drain(policy) == drain(untouched)


READ = {
    "gdsf": ("num_bytes", "recompute_cost"),
    "gittins": ("num_tokens", "text_tokens", "num_known_blocks"),
    "adaptive": ("num_tokens", "text_tokens", "num_known_blocks", "depth"),
}


RUNS: dict[str, Callable[[Any, list[Any]], Any]] = {
    "insert": lambda p, infos: p.insert(51, key(51), infos[1]),
    "replace": lambda p, infos: p.replace([50, 51], [key(50), key(51)], infos),
    "exchange": lambda p, infos: p.exchange([2, 1], [50, 51], [key(50), key(51)], infos),
    "admit": lambda p, infos: p.admit([50, 51], [key(50), key(51)], infos),
}


def bad_infos(field: str) -> list[tuple[type[Exception], Any]]:
    """Infos with one field that is none, and how each is refused."""
    bad: list[tuple[type[Exception], Any]] = [(TypeError, "much"), (TypeError, None)]
    if field == "recompute_cost":
        bad += [(ValueError, float(each)) for each in ("nan", "inf", "-inf")]
    else:
        bad += [(ValueError, 1 << 64), (TypeError, 0.5)]
    if field == "num_bytes":
        bad += [(AssertionError, 0), (AssertionError, -1)]
    return [(error, Info(**{field: value})) for error, value in bad] + [(AttributeError, object())]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("name", "field"), [(name, field) for name, fields in READ.items() for field in fields])
def test_what_a_policy_reads_of_a_block_is_checked(name: str, field: str, run: str) -> None:
    call = RUNS[run]
    for error, info in bad_infos(field):
        policy = filled(name, 4)
        policy.touch(0)
        untouched, victim = copy.deepcopy(policy), policy.victim()
        for infos in ([INFO, info], [info, info]):
            with pytest.raises(error) as refusal:
                call(policy, infos)
            assert "is known" not in str(refusal.value)
            assert [50 in policy, 51 in policy] == [False, False]
            assert policy.victim() == victim
        for each in (policy, untouched):
            call(each, [INFO, INFO])
            assert 51 in each
            if run == "admit":
                each.unlock(50)
                each.unlock(51)
        found = drain(policy)
        assert found == drain(untouched)
        assert len(found) == {"insert": 5, "admit": 6}.get(run, 4)


@every_policy
def test_an_info_of_another_class_serves(name: str) -> None:
    policy = filled(name, 4)
    policy.insert(50, key(50), Info())
    assert 50 in policy


@every_policy
@pytest.mark.parametrize("capacity", [0, -1, 1 << 62, 1 << 80, "7", None, 1.5])
def test_a_capacity_that_is_none_is_refused(name: str, capacity: Any) -> None:
    with pytest.raises((AssertionError, ValueError, TypeError)):
        POLICIES[name](capacity)


def test_a_name_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="no native policy"):
        _native.NativePolicy("fifo", 5)


@every_policy
def test_no_number_is_a_block_that_cannot_be_one(name: str) -> None:
    policy = filled(name, 4)
    policy.insert(MOST_BLOCK, key(9), INFO)
    assert [each in policy for each in (MOST_BLOCK, 3, -1, 1 << 70, "3", None)] == [True, True] + [False] * 4


@pytest.mark.parametrize("name", READ)
def test_arguments_that_change_while_they_are_read_do_no_harm(name: str) -> None:
    policy = filled(name, 4)
    blocks = [50, 51, 52]
    infos: list[Any] = []

    class Changing(Info):
        def __getattribute__(self, field: str) -> Any:
            infos.clear()
            blocks.clear()
            if 0 in policy:
                policy.remove(0, True)
            return object.__getattribute__(self, field)

    infos += [Changing(), INFO, INFO]
    with pytest.raises(IndexError):
        policy.replace(blocks, [key(50), key(51), key(52)], infos)
    assert sorted(drain(policy)) == [1, 2, 3]


@every_policy
def test_a_copy_goes_its_own_way(name: str) -> None:
    policy = filled(name, 40)
    policy.lock(4)
    policy.touch_all([3, 9])
    other = copy.deepcopy(policy)
    first = drain(policy)
    assert len(first) == 39
    other.unlock(4)
    other.replace([50, 51], [key(50), key(2)], [INFO, INFO])
    assert len(drain(other)) == 40
    policy.unlock(4)
    assert drain(policy) == [4]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="a sanitizer keeps freed memory for a while")
@every_policy
def test_memory_does_not_grow_with_the_keys_seen(name: str) -> None:
    policy = filled(name, 500)
    infos = [INFO] * 100

    def play(begin: int, end: int) -> None:
        for start in range(begin, end, 100):
            run = range(start, start + 100)
            victims = policy.replace(run, [key(each) for each in run], infos)
            assert len(victims) == 100
            there = [each for each in run if each in policy]
            policy.touch_all(there[:50])
            policy.lock(there[0])
            policy.victim()
            policy.unlock(there[0])

    play(1000, 60_000)
    before = resident_bytes()
    play(60_000, 360_000)
    # With nothing forgotten it would be 300,000 keys of 32 bytes, some 20 MB in a table.
    assert resident_bytes() - before < 3 << 20


def seconds_of_evictions(name: str, num_blocks: int) -> float:
    """The least of three, of 2,000 misses of a full cache in which the first half is locked."""
    policy = filled(name, num_blocks)
    for block in range(num_blocks // 2):
        policy.lock(block)
    found = []
    for attempt in range(3):
        began = time.thread_time()
        for number in range(2000):
            block = policy.victim()
            policy.remove(block, True)
            policy.insert(block, key(num_blocks * (attempt + 1) + number), INFO)
            policy.touch(number % 5)
        found.append(time.thread_time() - began)
    return min(found)


@every_policy
def test_an_eviction_walks_past_no_locked_block(name: str) -> None:
    # Walking past 50,000 locked blocks each time would take a hundred times as long as past 500.
    assert seconds_of_evictions(name, 100_000) < 20 * seconds_of_evictions(name, 1000)


def orders(count: int) -> dict[str, list[int]]:
    """Orders of the first numbers that heaps and lists may take badly; the last ones take turns from both ends."""
    ascending = list(range(count))
    mixed = random.Random(count).sample(ascending, count)
    ends = [0, *ascending[1::2], *reversed(ascending[2::2])]
    return {
        "ascending": ascending,
        "descending": ascending[::-1],
        "random": mixed,
        "from the ends": ends,
        "to the ends": [0, *ends[:0:-1]],
    }


def lock_all(policy: Any) -> list[int]:
    """Lock each victim until there is none: they are set aside one by one."""
    order = []
    while (block := policy.victim()) is not None:
        order.append(block)
        policy.lock(block)
    return order


def seconds_of_unlocking(name: str, num_blocks: int, order: str) -> float:
    """The least of three: blocks that are set aside come back in an order, leave one by one as victims or by a use."""
    policy = filled(name, num_blocks)
    places = orders(num_blocks)[order]
    found = []
    for _ in range(3):
        standing = lock_all(policy)
        assert len(standing) == num_blocks
        coming = [standing[at] for at in places]
        began = time.thread_time()
        for block in coming:
            policy.unlock(block)
        assert lock_all(policy) == standing
        for block in coming:
            policy.unlock(block)
            policy.victim()
        for block in coming:
            policy.touch(block)
        policy.victim()
        found.append(time.thread_time() - began)
    return min(found)


@every_policy
@pytest.mark.parametrize("order", orders(3))
def test_locked_blocks_come_back_in_any_order_at_little_cost(name: str, order: str) -> None:
    # Of 32 times as many each takes up to five times as long, for they do not fit into the nearest caches; walking past
    # the others, all together would take a thousand times.
    assert seconds_of_unlocking(name, 48_000, order) < 500 * seconds_of_unlocking(name, 1500, order)
