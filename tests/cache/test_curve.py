from __future__ import annotations

import random
from statistics import fmean

import pytest

from pagemill.base.errors import ConfigError
from pagemill.cache.curve import ReuseCurve
from pagemill.simulator.replay import replay_lru
from pagemill.simulator.workload import generate

SIZES = (100, 300, 1000, 3000, 6000)


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


def test_before_any_traffic_nothing_is_expected() -> None:
    assert ReuseCurve().curve([1, 10]) == [0.0, 0.0]


def test_a_loop_hits_from_the_size_that_holds_it() -> None:
    curve = ReuseCurve()
    for _ in range(50):
        for number in range(64):
            curve.record(key(number))
    assert curve.curve([32]) == [0.0]
    assert curve.curve([70])[0] == pytest.approx(49 / 50)


def test_keys_that_never_come_back_never_hit() -> None:
    curve = ReuseCurve(64)
    for number in range(5000):
        curve.record(key(number))
    assert max(curve.curve(SIZES)) <= 0.05


@pytest.mark.parametrize("load", ["chat", "documents"])
@pytest.mark.parametrize(("max_keys", "allowed"), [(100_000, 0.005), (4096, 0.02)])
def test_the_curve_is_near_the_simulated_one(load: str, max_keys: int, allowed: float) -> None:
    trace = generate(load, 600, seed=3)
    curve = ReuseCurve(max_keys)
    for request in trace.requests:
        for block in reversed(request.blocks):
            curve.record(key(block))
    simulated = [replay_lru(trace, size).block_hit_ratio for size in SIZES]
    errors = [abs(one - other) for one, other in zip(curve.curve(SIZES), simulated, strict=True)]
    assert fmean(errors) <= allowed


def test_memory_is_bounded() -> None:
    curve = ReuseCurve(100)
    rng = random.Random(1)
    for _ in range(20_000):
        curve.record(key(rng.randrange(5000)))
    assert curve.num_keys <= 100
    assert len(curve._by_hash) == curve.num_keys
    assert 0.005 < curve.sampled_share < 0.05
    assert curve.num_recorded == 20_000


def test_the_curve_never_falls() -> None:
    curve = ReuseCurve(200)
    rng = random.Random(2)
    for _ in range(5000):
        curve.record(key(int(rng.expovariate(0.003))))
    values = curve.curve(range(1, 2000, 7))
    assert values == sorted(values)
    assert 0 <= values[0] <= values[-1] <= 1


def test_sizes_and_samples_below_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="sizes from 1"):
        ReuseCurve().curve([10, 0])
    with pytest.raises(ConfigError, match="at least 1"):
        ReuseCurve(0)
