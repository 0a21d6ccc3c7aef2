"""S2: no look-up hits another tenant's text."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.contracts.cache import broken
from tests.trust import crossing
from tests.trust.figures import Figure


@pytest.mark.parametrize("part", range(5))
def test_random_traffic_with_shared_texts_never_crosses(part: int, publish: Callable[[Figure], None]) -> None:
    figure = crossing.count(range(2 * part, 2 * part + 2))
    publish(figure)
    assert figure.num_trials == 2 * crossing.NUM_LOOKUPS
    assert figure.also["look-ups that hit"] > figure.num_trials // 2


@pytest.mark.parametrize(
    "bug", [broken.shares_across_tenants, broken.shares_across_salts, broken.no_copy], ids=lambda each: each.__name__
)
def test_a_cache_that_crosses_is_noticed(
    bug: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    bug(monkeypatch)
    figure = crossing.count(range(1, 2), 1000)
    assert figure.num_failures
    assert "--replay S2:1" in figure.replays[0]
