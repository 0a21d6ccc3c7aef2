"""R14: simulations from seeds."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.contracts.cache import broken
from tests.trust import days, simulation
from tests.trust.figures import Figure

SEEDS = 50


@pytest.mark.parametrize("part", range(4))
def test_simulations_go_right(part: int, publish: Callable[[Figure], None]) -> None:
    figure = simulation.count(range(part * SEEDS, (part + 1) * SEEDS))
    publish(figure)
    assert min(figure.also.values()) > 0, "the seeds met too little"


def test_days_of_a_server_go_right(publish: Callable[[Figure], None]) -> None:
    figure = days.count(range(1000, 1000 + SEEDS))
    publish(figure)
    assert min(figure.also.values()) > 0, "the days met too little"


def test_a_day_gone_wrong_is_told_with_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    broken.no_copy(monkeypatch)
    figure = days.count(range(20))
    assert figure.num_failures
    assert "run_day(" in figure.replays[0]


def test_a_seed_does_the_same_twice() -> None:
    assert simulation.replay(11) == simulation.replay(11)


@pytest.mark.parametrize(
    "bug",
    [
        broken.longest_common_in_any_order,
        broken.no_copy,
        broken.short_copy,
        broken.leaks_on_close,
        broken.frees_twice,
        broken.failure_changes_something,
        broken.unlocked_in_use,
        broken.unfollowed,
        broken.pins_end_at_once,
        broken.no_wipe,
        broken.purge_leaves_the_tree,
        broken.stores_under_another_key,
        broken.shares_across_tenants,
    ],
    ids=lambda each: each.__name__,
)
def test_a_planted_bug_is_found_with_its_replay(
    bug: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    bug(monkeypatch)
    for seed in range(40):
        figure = simulation.count(range(seed, seed + 1))
        if figure.num_failures:
            break
    assert figure.num_failures
    assert f"--replay R14:{seed}" in figure.replays[0]
