"""S3: time tells a tenant's own texts and no others."""

from __future__ import annotations

from collections.abc import Callable

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
