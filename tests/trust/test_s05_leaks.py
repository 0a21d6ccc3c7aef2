"""S5: what one tenant is told does not depend on what another one writes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.contracts.cache import broken
from tests.trust import leaks, server_leaks
from tests.trust.figures import Figure

PAIRS = 30


@pytest.mark.parametrize("part", range(2))
def test_an_observer_sees_the_same_whatever_another_tenant_writes(part: int, publish: Callable[[Figure], None]) -> None:
    figure = leaks.count(range(part * PAIRS, (part + 1) * PAIRS))
    publish(figure)
    controls = figure.also["controls that differ (same tenant)"]
    assert controls > 0.9 * figure.num_trials, "an observer that sees nothing proves nothing"


def test_a_cache_that_shares_across_tenants_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    broken.shares_across_tenants(monkeypatch)
    figure = leaks.count(range(2))
    assert figure.num_failures
    assert "--replay S5:" in figure.replays[0]


def test_an_observer_is_told_the_same_over_http_whatever_another_tenant_asks(publish: Callable[[Figure], None]) -> None:
    figure = server_leaks.count(range(1))
    publish(figure)
    assert figure.also["controls that differ (same key)"] == figure.num_trials
    assert figure.also["things told over HTTP"] > 15
