"""R5: block accounting against a slow model."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.contracts.cache.broken import ALL
from tests.trust import accounting
from tests.trust.figures import Figure

SEEDS = 80  # more than 15 thousand operations


@pytest.mark.parametrize("part", range(2))
def test_random_operations_lose_no_block_and_diverge_nowhere(part: int, publish: Callable[[Figure], None]) -> None:
    figure = accounting.count(range(part * SEEDS, (part + 1) * SEEDS))
    publish(figure)
    assert figure.num_trials >= 15_000
    assert min(figure.also.values()) > 500, "too little was met to tell anything"


@pytest.mark.parametrize("broken", ALL, ids=lambda each: each.__name__)
def test_a_broken_cache_is_counted_with_its_replay(
    broken: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch)
    for first in range(0, 40, 4):
        figure = accounting.count(range(first, first + 4))
        if figure.num_failures:
            break
    assert figure.num_failures
    assert "--replay R5:" in figure.replays[0]
