from __future__ import annotations

import pytest

from pagemill.cache.eviction import recompute_cost
from pagemill.cache.policies.base import BlockInfo
from pagemill.cache.policies.gdsf import GDSF


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


def drain(policy: GDSF) -> list[int]:
    order = []
    while (block := policy.victim()) is not None:
        order.append(block)
        policy.remove(block, True)
    return order


def test_the_cost_of_a_block_grows_with_its_position_in_steps() -> None:
    assert recompute_cost(0) == recompute_cost(16) == 1.0
    assert recompute_cost(400) == 1.125
    assert recompute_cost(8192) == pytest.approx(1 + 8192 * 3.3e-4, abs=1 / 8)
    costs = [recompute_cost(position) for position in range(0, 10_000, 16)]
    assert costs == sorted(costs)


def test_of_blocks_used_alike_the_one_that_is_cheap_to_compute_leaves_first() -> None:
    policy = GDSF(4)
    for block, position in enumerate((4000, 0, 8000, 1000)):
        policy.insert(block, key(block), BlockInfo(16, recompute_cost=recompute_cost(position)))
    assert drain(policy) == [1, 3, 0, 2]


def test_of_blocks_used_alike_the_one_with_a_large_page_leaves_first() -> None:
    policy = GDSF(3)
    for block, num_bytes in enumerate((1000, 4000, 2000)):
        policy.insert(block, key(block), BlockInfo(16, num_bytes=num_bytes))
    assert drain(policy) == [1, 2, 0]


@pytest.mark.parametrize("num_bytes", [1, 3, 184_320])
def test_pages_of_one_size_make_few_ranks_whatever_the_size(num_bytes: int) -> None:
    policy = GDSF(50)
    for block in range(50):
        policy.insert(block, key(block), BlockInfo(16, num_bytes=num_bytes))
    for number in range(50, 2000):
        run = policy.replace([number], [key(number)], [BlockInfo(16, num_bytes=num_bytes)])
        if number % 3 == 0:
            policy.touch(number)
        assert len(run) == 1
    assert len(policy._order.lanes) <= 4
