"""What every policy promises, and equality with slow models. A new policy is tested by being in the registry."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import pytest

from pagemill.base.errors import ConfigError
from pagemill.cache.policies.base import BlockInfo, OneByOne, Policy
from tests.fixtures.policy_makers import EVERY_POLICY, make_policy
from tests.fixtures.policy_models import Driver, SlowARC, SlowGDSF, SlowLFU, SlowLRU, SlowS3FIFO

INFO = BlockInfo(num_tokens=16)
MODELS: dict[str, type[SlowLRU]] = {
    "lru": SlowLRU,
    "lfu": SlowLFU,
    "s3fifo": SlowS3FIFO,
    "arc": SlowARC,
    "gdsf": SlowGDSF,
}
every_policy = pytest.mark.parametrize("name", EVERY_POLICY)
with_a_model = pytest.mark.parametrize("name", [each for each in EVERY_POLICY if each.split()[-1] in MODELS])


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


def filled(name: str, count: int, capacity: int | None = None) -> Policy:
    policy = make_policy(name, capacity or count)
    for block in range(count):
        policy.on_miss(key(block))
        policy.insert(block, key(block), INFO)
    return policy


def drain(policy: Policy) -> list[int]:
    order = []
    while (block := policy.victim()) is not None:
        order.append(block)
        policy.remove(block, True)
    return order


@every_policy
def test_an_empty_policy_has_no_victim(name: str) -> None:
    assert make_policy(name, 4).victim() is None


@every_policy
def test_every_block_leaves_once(name: str) -> None:
    assert sorted(drain(filled(name, 50))) == list(range(50))


@every_policy
def test_a_victim_asked_for_twice_is_the_same_and_stays_until_removed(name: str) -> None:
    policy = filled(name, 20)
    for block in (3, 3, 3, 7):
        policy.touch(block)
    first = policy.victim()
    assert first is not None
    assert policy.victim() == first
    policy.remove(first, True)
    assert policy.victim() != first


@every_policy
def test_a_locked_block_is_never_a_victim(name: str) -> None:
    policy = filled(name, 20)
    for block in range(0, 20, 2):
        policy.lock(block)
    assert sorted(drain(policy)) == list(range(1, 20, 2))
    for block in range(0, 20, 2):
        policy.unlock(block)
    assert sorted(drain(policy)) == list(range(0, 20, 2))


@every_policy
def test_locking_and_unlocking_changes_no_order(name: str) -> None:
    plain, locked = filled(name, 30), filled(name, 30)
    for block in (4, 9, 4):
        plain.touch(block)
    for block in range(30):
        locked.lock(block)
    for block in (4, 9, 4):
        locked.touch(block)
    for block in reversed(range(30)):
        locked.unlock(block)
    assert drain(locked) == drain(plain)


@every_policy
def test_a_block_can_be_used_again_after_it_was_purged(name: str) -> None:
    policy = filled(name, 8)
    policy.lock(3)
    policy.remove(3, False)
    policy.insert(3, key(100), INFO)
    assert sorted(drain(policy)) == list(range(8))


MISTAKES: list[tuple[str, Callable[[Policy], None]]] = [
    ("inserted twice", lambda policy: policy.insert(2, key(2), INFO)),
    ("touched unknown", lambda policy: policy.touch(99)),
    ("locked unknown", lambda policy: policy.lock(99)),
    ("locked twice", lambda policy: policy.lock(5)),
    ("unlocked unlocked", lambda policy: policy.unlock(2)),
    ("removed unknown", lambda policy: policy.remove(99, True)),
]


@every_policy
@pytest.mark.parametrize("mistake", [each[1] for each in MISTAKES], ids=[each[0] for each in MISTAKES])
def test_a_refused_call_changes_nothing(name: str, mistake: Callable[[Policy], None]) -> None:
    policy = filled(name, 10)
    policy.lock(5)
    untouched = copy.deepcopy(policy)
    with pytest.raises(AssertionError):
        mistake(policy)
    policy.unlock(5)
    untouched.unlock(5)
    assert drain(policy) == drain(untouched)


@every_policy
@pytest.mark.parametrize("seed", range(4))
def test_the_same_calls_give_the_same_victims(name: str, seed: int) -> None:
    driver = Driver([make_policy(name, 12), make_policy(name, 12)], 12, seed)
    for _ in range(1500):
        driver.step()
    assert driver.num_evictions > 50


@with_a_model
@pytest.mark.parametrize("capacity", [1, 5, 16])
@pytest.mark.parametrize("seed", range(4))
def test_victims_equal_the_slow_models(name: str, capacity: int, seed: int) -> None:
    driver = Driver([make_policy(name, capacity), MODELS[name.split()[-1]](capacity)], capacity, seed)
    for _ in range(1500):
        driver.step()
        driver.victim()
    assert driver.num_evictions > 50


def play(policy: Policy, name: str, seed: int, *, many: bool) -> list[int]:
    """Victims of chains that are used over and over, by the calls for many blocks or by those for one."""
    rng = random.Random(seed)
    there: dict[int, None] = {}
    victims: list[int] = []
    for step in range(300):
        if step == 150:
            policy.resize(40)
        start = 12 * int(rng.paretovariate(0.8)) % 240
        chain = list(range(start, start + rng.randint(1, 12)))[::-1]
        hits = [block for block in chain if block in there]
        missing = [block for block in chain if block not in there]
        infos = [
            BlockInfo(16, depth=block % 12, recompute_cost=1 + block % 12 / 8, text_tokens=start) for block in missing
        ]
        keys = [key(block) for block in missing]
        locked = sorted(there)[: rng.randrange(4)] if step % 3 == 0 else []
        for block in locked:
            policy.lock(block)
        if many:
            policy.touch_all(hits)
        else:
            for block in hits:
                policy.touch(block)
        while missing and len(there) < 40:
            policy.on_miss(keys[0])
            policy.insert(missing[0], keys.pop(0), infos.pop(0))
            there[missing.pop(0)] = None
        gone = (policy.replace if many else partial(OneByOne.replace, policy))(missing, keys, infos)
        there |= dict.fromkeys(missing)
        for block in gone:
            del there[block]
        victims += gone
        for block in locked:
            policy.unlock(block)
    return [*victims, *drain(policy)]


@every_policy
@pytest.mark.parametrize("seed", range(3))
def test_calls_for_many_blocks_do_what_calls_for_one_do(name: str, seed: int) -> None:
    many = play(make_policy(name, 40), name, seed, many=True)
    assert many == play(make_policy(name, 40), name, seed, many=False)
    assert len(many) > 400


def play_unlocked(policy: Policy, seed: int, *, many: bool) -> list[int]:
    """Victims of chains where nothing is ever locked, so that no call for many blocks falls back on those for one."""
    rng = random.Random(seed)
    there = dict.fromkeys(range(1000, 1040))
    for block in there:
        policy.insert(block, key(block), INFO)
    victims: list[int] = []
    for _ in range(400):
        start = 12 * int(rng.paretovariate(0.8)) % 240
        chain = list(range(start, start + rng.randint(1, 50)))[::-1]
        hits = [block for block in chain if block in there]
        missing = [block for block in chain if block not in there]
        infos = [BlockInfo(16 - block % 2, block % 12, text_tokens=start) for block in missing]
        if many:
            policy.touch_all(hits)
        else:
            for block in hits:
                policy.touch(block)
        replace = policy.replace if many else partial(OneByOne.replace, policy)
        gone = replace(missing, [key(block) for block in missing], infos)
        there |= dict.fromkeys(missing)
        for block in gone:
            del there[block]
        victims += gone
    return [*victims, *drain(policy)]


@every_policy
@pytest.mark.parametrize("seed", range(3))
def test_calls_for_many_unlocked_blocks_do_what_calls_for_one_do(name: str, seed: int) -> None:
    many = play_unlocked(make_policy(name, 40), seed, many=True)
    assert many == play_unlocked(make_policy(name, 40), seed, many=False)
    assert len(many) > 2000


@every_policy
@pytest.mark.parametrize("locked", [(), (3, 11)])
def test_an_exchange_is_a_miss_a_removal_and_an_insertion_for_each_block(name: str, locked: tuple[int, ...]) -> None:
    at_once, one_by_one = filled(name, 12), filled(name, 12)
    blocks, victims = [20, 21, 22, 23], [7, 20, 0, 5]
    keys = [key(block) for block in blocks]
    for policy in (at_once, one_by_one):
        for block in locked:
            policy.lock(block)
        policy.touch(4)
    at_once.exchange(victims, blocks, keys, [INFO] * 4)
    for block, victim in zip(blocks, victims, strict=True):
        one_by_one.on_miss(key(block))
        one_by_one.remove(victim, True)
        one_by_one.insert(block, key(block), INFO)
    assert drain(at_once) == drain(one_by_one)


@every_policy
def test_a_refused_exchange_changes_nothing(name: str) -> None:
    policy = filled(name, 10)
    untouched = copy.deepcopy(policy)
    with pytest.raises(AssertionError):
        policy.exchange([1], [3], [key(3)], [INFO])
    with pytest.raises(AssertionError):
        policy.exchange([1, 99], [50, 51], [key(50), key(51)], [INFO, INFO])
    assert drain(policy) == drain(untouched)


@pytest.mark.parametrize("name", ["lfu", "gdsf"])
def test_a_block_that_is_used_over_and_over_leaves_nothing_behind(name: str) -> None:
    policy: Any = filled(name, 4)
    for _ in range(2000):
        policy.touch(2)
    assert len(policy._order.lanes) <= 2
    assert len(policy._order.ranks) < 100


@every_policy
def test_no_block_of_a_run_may_be_known_or_unknown_where_it_must_not(name: str) -> None:
    policy = filled(name, 10)
    untouched = copy.deepcopy(policy)
    with pytest.raises(AssertionError):
        policy.touch_all([1, 2, 99])
    with pytest.raises(AssertionError):
        policy.replace([50, 3], [key(50), key(3)], [INFO, INFO])
    assert drain(policy) == drain(untouched)


@every_policy
def test_nothing_is_replaced_where_everything_is_locked(name: str) -> None:
    policy = filled(name, 3)
    for block in range(3):
        policy.lock(block)
    with pytest.raises(AssertionError):
        policy.replace([7], [key(7)], [INFO])
    policy.unlock(1)
    assert policy.replace([7], [key(7)], [INFO]) == [1]


@every_policy
@pytest.mark.parametrize("capacity", [1, 7, 30, 3000])
def test_a_resize_keeps_every_block_and_lock(name: str, capacity: int) -> None:
    policy = filled(name, 30)
    for block in range(0, 30, 3):
        policy.lock(block)
    for block in range(10):
        policy.touch(block)
    policy.resize(capacity)
    assert policy.victim() not in range(0, 30, 3)
    for block in range(0, 30, 3):
        policy.unlock(block)
    assert sorted(drain(policy)) == list(range(30))
    for block in range(60):
        policy.on_miss(key(block))
        policy.insert(block, key(block), INFO)
    assert sorted(drain(policy)) == list(range(60))


@pytest.mark.parametrize("name", ["lru", "lfu", "native lru", "native lfu"])
def test_a_resize_does_not_change_an_order_of_uses(name: str) -> None:
    plain, resized = filled(name, 20), filled(name, 20)
    resized.resize(5)
    assert drain(plain) == drain(resized)


@every_policy
def test_a_resize_to_nothing_is_refused(name: str) -> None:
    with pytest.raises(AssertionError):
        filled(name, 4).resize(0)


def calls_of(action: Callable[[], Any]) -> int:
    """Python and C calls that an action makes: a cost that no other load on the machine changes."""
    count = 0

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


def eviction_cost(name: str, num_blocks: int) -> float:
    """Calls for each miss of a full cache in which every other block is locked."""
    policy = filled(name, num_blocks)
    for block in range(0, num_blocks, 2):
        policy.lock(block)

    def evict() -> None:
        for number in range(400):
            policy.on_miss(key(num_blocks + number))
            block = policy.victim()
            assert block is not None
            policy.remove(block, True)
            policy.insert(block, key(num_blocks + number), INFO)
            policy.touch(num_blocks - 1 - number // 2 * 2)

    return calls_of(evict) / 400


@every_policy
def test_an_eviction_walks_past_no_locked_block(name: str) -> None:
    small, large = eviction_cost(name, 1_000), eviction_cost(name, 16_000)
    assert large <= 2.5 * small + 60


@pytest.mark.parametrize("form", ["", "native "])
def test_an_unknown_policy_is_refused_with_the_nearest_name(form: str) -> None:
    with pytest.raises(ConfigError, match=r"did you mean 's3fifo'.*lru, lfu, s3fifo"):
        make_policy(f"{form}s3-fifo", 10)


@pytest.mark.parametrize("form", ["", "native "])
def test_a_cache_without_room_is_refused(form: str) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        make_policy(f"{form}lru", 0)
