from __future__ import annotations

import hashlib
import random
from array import array
from statistics import fmean

import pytest

from pagemill.base.errors import ConfigError
from pagemill.cache.curve import ReuseCurve
from pagemill.cache.entry import SharingConfig
from pagemill.cache.manager import CacheManager
from pagemill.simulator.replay import replay_lru, replay_manager
from pagemill.simulator.trace import Trace
from pagemill.simulator.workload import generate

SIZES = (100, 300, 1000, 3000, 6000)


def key(number: int) -> bytes:
    return hashlib.sha256(number.to_bytes(8, "little")).digest()


def recorded(trace: Trace, max_keys: int) -> ReuseCurve:
    curve = ReuseCurve(max_keys)
    for request in trace.requests:
        curve.record([key(block) for block in request.blocks])
    return curve


def test_before_any_traffic_nothing_is_expected() -> None:
    assert ReuseCurve().curve([1, 10]) == [0.0, 0.0]


def test_a_loop_of_single_blocks_hits_from_the_size_that_holds_it() -> None:
    curve = ReuseCurve()
    for _ in range(50):
        for number in range(60):
            curve.record([key(number)])
    assert curve.curve([55]) == [0.0]
    assert curve.curve([64])[0] == pytest.approx(49 / 50)


def test_a_text_asked_for_again_hits_as_far_as_the_cache_reaches() -> None:
    """What a cache of n blocks keeps of a text of 10 is its first n, for it was used last block first."""
    curve = ReuseCurve()
    for _ in range(2):
        curve.record([key(number) for number in range(10)])
    assert curve.curve(range(1, 13)) == pytest.approx([min(size, 10) / 20 for size in range(1, 13)])


def test_small_sizes_are_exact_where_every_key_is_followed() -> None:
    trace = generate("chat", 60, seed=5)
    curve = recorded(trace, 100_000)
    simulated = [replay_lru(trace, size).block_hit_ratio for size in range(1, 16)]
    assert curve.curve(range(1, 16)) == pytest.approx(simulated, abs=1e-12)


def test_keys_that_never_come_back_never_hit() -> None:
    curve = ReuseCurve(64)
    for number in range(5000):
        curve.record([key(number)])
    assert max(curve.curve(SIZES)) <= 0.05


@pytest.mark.parametrize("load", ["chat", "documents"])
@pytest.mark.parametrize(("max_keys", "allowed"), [(100_000, 0.002), (4096, 0.02)])
def test_the_curve_is_near_the_simulated_one(load: str, max_keys: int, allowed: float) -> None:
    trace = generate(load, 600, seed=3)
    simulated = [replay_lru(trace, size).block_hit_ratio for size in SIZES]
    found = recorded(trace, max_keys).curve(SIZES)
    assert fmean(abs(one - other) for one, other in zip(found, simulated, strict=True)) <= allowed


def test_blocks_of_an_answer_are_hit_when_they_are_first_looked_for() -> None:
    curve = ReuseCurve()
    curve.record([key(1), key(2)])
    curve.insert(key(3))
    curve.record([key(1), key(2), key(3), key(4)])
    assert curve.num_recorded == 6
    assert curve.curve([4]) == [pytest.approx(3 / 6)]
    assert curve.curve([2])[0] < 3 / 6


def test_an_inserted_block_that_is_there_already_keeps_its_place() -> None:
    with_insert, without = ReuseCurve(), ReuseCurve()
    for curve in (with_insert, without):
        curve.record([key(1)])
        curve.record([key(2)])
        if curve is with_insert:
            curve.insert(key(1))
        curve.record([key(1)])
    assert with_insert.curve([1, 2]) == without.curve([1, 2])


def test_memory_is_bounded() -> None:
    curve = ReuseCurve(100)
    rng = random.Random(1)
    for _ in range(20_000):
        curve.record([key(rng.randrange(5000))])
        curve.insert(key(rng.randrange(5000, 6000)))
        assert curve.num_keys <= 100
        assert len(curve._tree) == 401
    assert 0.005 < curve.sampled_share < 0.05
    assert curve.num_recorded == 20_000


def test_many_texts_do_not_change_what_is_counted() -> None:
    """Texts are numbered anew when their numbers run out; distances stay those of one long count."""
    few, many = ReuseCurve(16), ReuseCurve(4000)
    rng = random.Random(4)
    for _ in range(2000):
        text = [key(rng.randrange(12))]
        few.record(text)
        many.record(text)
    assert few.sampled_share == many.sampled_share == 1
    assert few.curve(range(1, 14)) == many.curve(range(1, 14))


def test_the_curve_never_falls() -> None:
    curve = ReuseCurve(200)
    rng = random.Random(2)
    for _ in range(5000):
        start = int(rng.expovariate(0.003))
        curve.record([key(start), key(start + 100_000)])
    values = curve.curve(range(1, 2000, 7))
    assert values == sorted(values)
    assert 0 <= values[0] <= values[-1] <= 1


def test_texts_without_whole_blocks_are_no_uses() -> None:
    curve = ReuseCurve()
    curve.record([])
    assert (curve.num_recorded, curve.num_keys) == (0, 0)


def test_sizes_and_samples_below_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="sizes from 1"):
        ReuseCurve().curve([10, 0])
    with pytest.raises(ConfigError, match="at least 1"):
        ReuseCurve(0)


def test_one_manager_tells_what_managers_of_other_sizes_hit() -> None:
    """Fed by real look-ups of a cache of one size, against the simulator's replay of the engine's cache at each."""
    trace = generate("chat", 250, seed=7)
    manager = CacheManager(800, 4, sharing=SharingConfig())
    for index, request in enumerate(trace.requests):
        tokens = array("i", [part for block in request.blocks for part in (block, 0, 0, 0)] + [0])
        manager.open(index, len(tokens), len(tokens), tokens)
        manager.commit(index, len(tokens))
        manager.close(index)
        manager.moved(manager.moves())
    sizes = (300, 800, 2000)
    simulated = [replay_manager(trace, "lru", size).block_hit_ratio for size in sizes]
    assert manager.curve.num_recorded == trace.num_accesses
    assert manager.curve.curve(sizes) == pytest.approx(simulated, abs=0.01)
