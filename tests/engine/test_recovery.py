"""Faults that come again and again at one request: it alone fails, and nobody's last delta is lost."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest

from pagemill.cache.entry import SharingConfig
from pagemill.cache.manager import CacheManager
from pagemill.engine.engine import Engine
from pagemill.engine.output import Output
from pagemill.engine.scheduler import Scheduler
from tests.fixtures.fake_engine import Rig
from tests.fixtures.fake_executor import answer

VICTIM, OTHER = list(range(40)), list(range(100, 140))


class PlantedError(RuntimeError):
    """Raised because a test wants it."""


def rig() -> Rig:
    return Rig(64, 4, max_num_batched_tokens=8, sharing=SharingConfig())


def planted(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, concerns: Any) -> None:
    inner = getattr(owner, method)

    def raising(self: Any, *arguments: Any, **options: Any) -> Any:
        if concerns(*arguments):
            raise PlantedError(method)
        return inner(self, *arguments, **options)

    monkeypatch.setattr(owner, method, raising)


@pytest.mark.parametrize("method", ["open", "commit", "grow"])
def test_a_request_at_which_the_cache_fails_each_time_ends_alone(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    engine = rig()
    concerns = {
        "open": lambda seq_id, *_: seq_id == 1,
        "commit": lambda seq_id, num_tokens: seq_id == 1 and num_tokens >= 16,
        "grow": lambda blocks, _: list(blocks.tokens) == VICTIM and blocks.committed >= 16,
    }[method]
    planted(monkeypatch, CacheManager, method, concerns)
    engine.add("victim", VICTIM, max_tokens=4)
    engine.add("other", OTHER, max_tokens=4)
    engine.num_rebuilds = 2
    answers = engine.run(most_steps=100)
    assert answers["victim", 0].finish_reason == "error"
    assert isinstance(answers["victim", 0].deltas[-1].error, PlantedError)
    assert (answers["other", 0].finish_reason, answers["other", 0].token_ids) == ("length", answer(OTHER, 4, 256))


def test_what_fails_at_every_other_step_comes_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = rig()
    calls = count()
    planted(monkeypatch, Engine, "_commit", lambda *_: next(calls) % 2)
    engine.add("long", VICTIM, max_tokens=4)
    engine.num_rebuilds = 4
    answers = engine.run(most_steps=100)
    assert isinstance(answers["long", 0].deltas[-1].error, PlantedError)


def test_requests_that_cannot_be_queued_take_nobody_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = rig()
    engine.add("other", OTHER, max_tokens=4)
    planted(monkeypatch, Output, "open", lambda sequence: sequence.request.request_id.startswith("victim"))
    for number in range(6):
        with pytest.raises(PlantedError):
            engine.add(f"victim {number}", VICTIM)
    engine.num_rebuilds = 1
    answers = engine.run(most_steps=100)
    assert (answers["other", 0].finish_reason, answers["other", 0].token_ids) == ("length", answer(OTHER, 4, 256))


def test_an_abort_tells_of_its_own_request_alone_whatever_fails_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = rig()
    engine.add("other", OTHER, max_tokens=4)
    names = [f"victim {number}" for number in range(6)]
    for name in names:
        engine.add(name, VICTIM)
    planted(monkeypatch, Scheduler, "remove", lambda sequence: sequence.request.request_id in names)
    for name in names:
        assert [(each.request_id, each.finish_reason) for each in engine.abort(name)] == [(name, "abort")]
    engine.num_rebuilds = 1
    answers = engine.run(most_steps=100)
    assert (answers["other", 0].finish_reason, answers["other", 0].token_ids) == ("length", answer(OTHER, 4, 256))
