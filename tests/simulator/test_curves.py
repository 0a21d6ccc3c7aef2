from __future__ import annotations

import pytest

from pagemill.base.clock import VirtualClock
from pagemill.base.errors import ConfigError
from pagemill.cache.policies.base import OneByOne
from pagemill.cache.policies.lru import LRU
from pagemill.kernels.policies import POLICIES
from pagemill.simulator.curves import allocation, hit_curves
from pagemill.simulator.trace import Request, Trace
from pagemill.simulator.workload import generate


def lengths(*pairs: tuple[int, int]) -> Trace:
    return Trace("lengths", 0, tuple(Request(0.0, one, two, ()) for one, two in pairs))


def test_a_row_for_each_size_and_policy() -> None:
    told: list[str] = []
    rows = hit_curves(generate("chat", 80, seed=1), ["lru", "gdsf"], [20, 500], VirtualClock(), told.append)
    assert [(each.blocks, each.policy) for each in rows] == [(20, "lru"), (20, "gdsf"), (500, "lru"), (500, "gdsf")]
    assert all(each.block_hit_ratio <= each.optimum <= each.ideal for each in rows)
    assert rows[0].optimum == rows[1].optimum < rows[2].optimum
    assert told[:2] == ["20 blocks: optimum", "20 blocks: lru"]


def test_an_unknown_policy_is_refused_before_anything_is_replayed() -> None:
    told: list[str] = []
    with pytest.raises(ConfigError, match="is unknown"):
        hit_curves(generate("chat", 80, seed=1), ["lru", "x"], [50], VirtualClock(), told.append)
    assert told == []


class Newest(LRU):
    """A policy of somebody's own: what came last leaves first."""

    name = "newest"

    def victim(self) -> int | None:
        return next((each for each in reversed(self._lane.order) if each not in self._locked), None)

    replace = OneByOne.replace
    evict_run = OneByOne.evict_run


@pytest.mark.parametrize("manager", [False, True])
def test_policies_of_ones_own_are_taken_beside_native_ones(manager: bool) -> None:
    trace, clock = generate("sweep", 60, seed=1), VirtualClock()
    makers = POLICIES | {"newest": Newest}
    rows = hit_curves(trace, ["lru", "newest"], [100], clock, manager=manager, makers=makers)
    assert [each.policy for each in rows] == ["lru", "newest"]
    assert rows[0].block_hit_ratio != rows[1].block_hit_ratio
    [plain] = hit_curves(trace, ["lru"], [100], clock, manager=manager)
    assert plain == rows[0]
    with pytest.raises(ConfigError, match=r"adaptive, newest$"):
        hit_curves(trace, ["newst"], [100], clock, makers=makers)


def test_unused_positions_of_one_sequence() -> None:
    row = allocation(lengths((3, 3)), block_tokens=4, concurrency=1)
    # 3 of 4, 4 of 4 and 5 of 8 positions are used.
    assert row.num_steps == 3
    assert row.unused_mean == pytest.approx((1 / 4 + 0 + 3 / 8) / 3)
    assert row.unused_p99 == pytest.approx(3 / 8)


def test_sequences_follow_each_other_at_the_concurrency() -> None:
    assert allocation(lengths(*[(4, 4)] * 6), block_tokens=4, concurrency=2).num_steps == 12
    assert allocation(lengths(*[(4, 4)] * 6), block_tokens=4, concurrency=9).num_steps == 4


def test_blocks_of_one_token_waste_nothing() -> None:
    assert allocation(lengths((5, 9), (0, 0), (70, 1)), block_tokens=1, concurrency=2).unused_mean == 0


@pytest.mark.parametrize(("block_tokens", "concurrency"), [(0, 1), (1, 0)])
def test_sizes_below_one_are_refused(block_tokens: int, concurrency: int) -> None:
    with pytest.raises(ConfigError, match="from 1"):
        allocation(lengths((1, 1)), block_tokens, concurrency)


def test_a_trace_without_requests_is_refused() -> None:
    with pytest.raises(ConfigError, match="no requests"):
        allocation(lengths())
