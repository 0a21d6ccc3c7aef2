"""R11: ten times the load, and a tenant that floods."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pagemill.engine.fairness import Share, Shares
from tests.trust import overload
from tests.trust.figures import Figure

SEEDS = 6


def test_a_flood_costs_little_goodput_and_other_tenants_little_time(publish: Callable[[Figure], None]) -> None:
    for figure in overload.count(range(SEEDS)):
        publish(figure)
    assert figure.num_trials > 200


def test_a_seed_does_the_same_twice() -> None:
    assert overload.replay(2) == overload.replay(2)


def test_a_scheduler_that_serves_by_arrival_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's turn comes before another's: what came first enters first."""

    def by_arrival(self: Shares) -> list[Share]:
        waiting = [share for share in self.active.values() if share.queue]
        return sorted(waiting, key=lambda share: share.queue.first(1)[0].request.arrival_s)

    monkeypatch.setattr(Shares, "waiting", by_arrival)
    monkeypatch.setattr(Shares, "above_fair", lambda *_: None)
    _, slowed = overload.count(range(1))
    assert slowed.num_failures > 3
    assert "--replay R11:0" in slowed.replays[0]
