"""R11: ten times the load, and a tenant that floods."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pagemill.engine.engine import Engine
from pagemill.engine.fairness import Share, Shares
from tests.trust import overload
from tests.trust.figures import Figure

SEEDS = 6


def test_a_flood_costs_little_goodput_and_other_tenants_little_time(publish: Callable[[Figure], None]) -> None:
    for figure in overload.count(range(SEEDS)):
        publish(figure)
    assert figure.num_trials > 200


def test_a_larger_world_holds_by_its_own_99th_percentile(publish: Callable[[Figure], None]) -> None:
    for figure in overload.count_each(range(1), overload.ALONE):
        publish(figure)
    assert figure.num_trials > 200


def test_a_seed_does_the_same_twice() -> None:
    size = overload.Size(100, ())
    assert overload.replay(2, size) == overload.replay(2, size)


def serve_by_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's turn comes before another's: what came first enters first."""

    def by_arrival(self: Shares) -> list[Share]:
        waiting = [share for share in self.active.values() if share.queue]
        return sorted(waiting, key=lambda share: share.queue.first(1)[0].request.arrival_s)

    monkeypatch.setattr(Shares, "waiting", by_arrival)
    monkeypatch.setattr(Shares, "above_fair", lambda *_: None)


def test_a_scheduler_that_serves_by_arrival_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    serve_by_arrival(monkeypatch)
    *_, slowed = overload.count(range(1))
    assert slowed.num_failures > 3
    assert "replay(0, Size(200, (1.3,)))" in slowed.replays[0]


def test_a_scheduler_that_serves_by_arrival_is_counted_in_a_world_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    serve_by_arrival(monkeypatch)
    _, _, slowed, _ = overload.count_each(range(1), overload.Size(200, ()))
    assert slowed.num_failures == 1
    assert "replay(0, Size(200, ()))" in slowed.replays[0]


def test_an_engine_whose_steps_take_longer_the_more_wait_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Engine.step

    def slow(self: Engine) -> object:
        self._clock.advance(2e-3 * self.stats().num_waiting)
        return step(self)

    monkeypatch.setattr(Engine, "step", slow)
    flooded, asked, _ = overload.count(range(1))
    assert (flooded.num_failures, asked.num_failures) == (1, 1)


def test_a_world_of_the_release_size_is_told_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    found = overload.Outcome(0.89, 0.91, overload.array("d", [1.0]), overload.array("d", [1.6]), 2, 0)
    monkeypatch.setattr(overload, "replay", lambda seed, size: found)
    figures = overload.shard(7)
    assert [each.num_failures for each in figures] == [1, 0, 1, 2]
    assert figures[2].replays == ["python scripts/trust.py --replay R11:7  # p99 1.60 times"]
