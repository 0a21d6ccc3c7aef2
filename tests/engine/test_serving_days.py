"""Days of a server from seeds, with faults: every request is answered rightly or ended for a reason, and none starves.

To see a seed again: `python -c "from tests.fixtures.serving import run_day; print(run_day(SEED))"`.
"""

from __future__ import annotations

import os

import pytest

from pagemill.base.params import CacheOptions
from pagemill.cache.entry import SharingConfig
from pagemill.engine.queue import PRIORITY_S
from tests.fixtures.fake_engine import STEP_S, Rig
from tests.fixtures.serving import run_day

NUM_SEEDS = int(os.environ.get("PAGEMILL_TEST_SEEDS", "120"))


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, 20))
def test_days_of_a_server_keep_every_promise(first: int) -> None:
    days = [run_day(seed) for seed in range(first, min(first + 20, NUM_SEEDS))]
    assert all(day.num_steps for day in days)


def test_the_days_hold_what_they_are_for() -> None:
    days = [run_day(seed) for seed in range(40)]
    ended = {reason for day in days for reason in day.ended}
    assert {"stop", "length", "abort", "error"} <= ended
    assert sum(day.num_preemptions for day in days) > 20
    assert sum(day.num_tails_dropped for day in days) > 0
    assert sum(day.num_refused for day in days) > 20


def test_a_seed_gives_the_same_day_again() -> None:
    assert run_day(7) == run_day(7)


def test_the_last_priority_is_served_while_the_first_keeps_coming() -> None:
    rig = Rig(max_num_seqs=1, max_num_batched_tokens=64)
    rig.add("last", [1, 2, 3], max_tokens=2, priority=2)
    index = 0
    while ("last", 0) not in rig.answers:
        rig.add(f"first{index}", [4, 5, index % 250], max_tokens=1, priority=-2)
        index += 1
        rig.step()
        rig.clock.advance(1.0 - STEP_S)
        assert index * 1.0 <= 4 * PRIORITY_S + 2, "it waits longer than its priority is worth"
    assert index > 3 * PRIORITY_S, "its priority counted for nothing"
    rig.run()


@pytest.mark.parametrize("sharing", [None, SharingConfig()], ids=["alone", "shared"])
def test_one_request_is_served_in_its_turn_while_another_tenant_floods(sharing: SharingConfig | None) -> None:
    rig = Rig(num_blocks=32, max_num_seqs=4, max_num_batched_tokens=16, sharing=sharing)
    flood, victim = CacheOptions(tenant="flood"), CacheOptions(tenant="victim")
    for index in range(200):
        rig.add(f"f{index}", [index % 256, 1, 2, 3, 4, 5], flood, max_tokens=12)
    for _ in range(10):
        rig.step()
    rig.add("v", [9, 9, 9], victim, max_tokens=12)
    for _ in range(20):
        rig.step()
    assert rig.answers["v", 0].finish_reason == "length"
    assert rig.engine.stats().num_waiting > 100
    for index in range(200):
        rig.abort(f"f{index}")
    rig.run()


def test_a_large_request_is_served_while_small_ones_of_its_tenant_keep_coming() -> None:
    rig = Rig(num_blocks=16, max_num_seqs=8, max_num_batched_tokens=64)
    for index in range(6):
        rig.add(f"early{index}", [index, 1, 2], max_tokens=9)
    rig.step()
    rig.add("large", list(range(50)), max_tokens=4)
    index = 0
    while ("large", 0) not in rig.answers:
        rig.add(f"small{index}", [index % 256, 7], max_tokens=6)
        index += 1
        rig.step()
        assert index < 30, "small ones that come later take its room for ever"
    rig.run()
