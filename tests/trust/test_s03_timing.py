"""S3: time tells a tenant's own texts and no others."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest

from tests.trust import timing
from tests.trust.figures import Figure

PER_ARM = 400
MOST_AUC = 0.60


@pytest.mark.timeout(600)
def test_time_tells_a_tenant_s_own_texts_and_no_others(publish: Callable[[Figure], None]) -> None:
    publish(timing.count(PER_ARM, MOST_AUC))


def test_the_statistic_is_the_one_that_it_says() -> None:
    assert timing.auc([3, 4], [1, 2]) == 1.0
    assert timing.auc([1, 2], [3, 4]) == 0.0
    assert timing.auc([1, 4], [2, 3]) == 0.5
    assert timing.upper_bound(0.5, 400) == pytest.approx(0.534, abs=0.002)
    assert timing.upper_bound(0.5, 1600) == pytest.approx(0.517, abs=0.001)


@pytest.mark.parametrize("times", [lambda place: 10 - place, lambda place: 1 + place], ids=["slow first", "fast first"])
def test_a_machine_whose_times_depend_on_the_order_alone_tells_nothing(times: Callable[[int], int]) -> None:
    """Neither between tenants nor in the control: every kind of probe has every place in a round."""
    calls, jitter = count(), random.Random(1)

    class Drifting:
        def ask(self, prompt: list[int]) -> tuple[float, int]:
            return times(next(calls) % (5 * timing.REPEATS)) + jitter.random() / 2, 0

    probers: Any = Drifting(), Drifting()
    found = timing.measure(*probers, random.Random(0), 1000)
    assert abs(found.crossed - 0.5) < 0.05
    assert abs(found.control - 0.5) < 0.05
