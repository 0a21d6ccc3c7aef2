"""Faults that come again and again at one request: it alone fails, nobody's last delta is lost, and no cache is dropped
for it."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest

from pagemill.cache.entry import SharingConfig
from pagemill.cache.manager import CacheManager
from pagemill.engine.engine import Engine
from pagemill.engine.output import Output
from pagemill.engine.scheduler import Scheduler
from pagemill.telemetry.metrics import Metrics
from pagemill.telemetry.observe import EngineObserver
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


FAULTS = {
    "open": lambda seq_id, *_: seq_id == 1,
    "commit": lambda seq_id, num_tokens: seq_id == 1 and num_tokens >= 16,
    "grow": lambda blocks, _: list(blocks.tokens) == VICTIM and blocks.committed >= 16,
}


@pytest.mark.parametrize("method", FAULTS)
def test_what_a_request_leaves_that_fails_alone_is_wiped(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    engine = rig()
    planted(monkeypatch, CacheManager, method, FAULTS[method])
    engine.add("victim", VICTIM, max_tokens=4)
    assert engine.run(most_steps=100)["victim", 0].finish_reason == "error"
    assert not engine.cache.moves()
    engine.assert_empty()


@pytest.mark.parametrize("method", FAULTS)
def test_a_request_at_which_the_cache_fails_each_time_ends_alone(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    engine = rig()
    planted(monkeypatch, CacheManager, method, FAULTS[method])
    engine.add("victim", VICTIM, max_tokens=4)
    engine.add("other", OTHER, max_tokens=4)
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
    answers = engine.run(most_steps=100)
    assert (answers["other", 0].finish_reason, answers["other", 0].token_ids) == ("length", answer(OTHER, 4, 256))


def test_a_request_whose_first_choice_never_enters_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = rig()
    planted(monkeypatch, CacheManager, "open", lambda seq_id, *_: seq_id == 1)
    metrics = Metrics("tiny")
    observer = EngineObserver(metrics)
    observer.added("request", len(VICTIM), 3)
    engine.add("request", VICTIM, max_tokens=4, n=3, temperature=1.0)
    answers = engine.run(most_steps=100)
    assert [answers["request", choice].finish_reason for choice in range(3)] == ["error", "length", "length"]
    stats = engine.cache.stats()
    num_asked = len(VICTIM) - 1  # the last token is always computed
    assert stats.num_asked_tokens == num_asked, "the second choice reads the prompt in the first one's place"
    assert stats.num_reentry_tokens == num_asked, "of the third"
    for choice in range(3):
        observer.stepped(answers["request", choice].deltas, 1.0)
    looked_up = {each.labels[1]: each.value for each in metrics["pagemill:kv_lookup_tokens"].samples()}
    assert looked_up == {"hit": 0, "miss": len(VICTIM)}


def test_a_text_that_cannot_be_published_at_its_end_costs_nobody_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = rig()
    monkeypatch.setattr(CacheManager, "verify", CacheManager.examine)  # which does not mind what went wrong by itself
    planted(monkeypatch, CacheManager, "publish_tail", lambda seq_id: seq_id == 1)
    engine.add("victim", VICTIM, max_tokens=4)
    engine.add("other", OTHER, max_tokens=4)
    answers = engine.run(most_steps=100)
    assert (answers["other", 0].finish_reason, answers["other", 0].token_ids) == ("length", answer(OTHER, 4, 256))
    engine.cache.check()
    engine.add("again", OTHER, max_tokens=4)
    assert engine.run()["again", 0].deltas[-1].num_cached_tokens == 39


def test_a_request_that_leaves_the_cache_unsound_is_computed_again_with_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = rig()
    engine.add("victim", VICTIM, max_tokens=4)
    engine.add("other", OTHER, max_tokens=4)
    engine.step()
    inner, done = CacheManager.grow, []

    def breaking(self: CacheManager, blocks: Any, num_tokens: int) -> bool:
        if not done:
            done.append(blocks)
            self._pool.num_references += 1
            raise PlantedError("half-way")
        return inner(self, blocks, num_tokens)

    monkeypatch.setattr(CacheManager, "grow", breaking)
    engine.num_rebuilds = 1
    answers = engine.run(most_steps=100)
    for name, prompt in (("victim", VICTIM), ("other", OTHER)):
        assert (answers[name, 0].finish_reason, answers[name, 0].token_ids) == ("length", answer(prompt, 4, 256))


def test_what_an_abort_cannot_end_is_ended_by_force(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = rig()
    engine.add("victim", VICTIM, max_tokens=4)
    engine.add("other", OTHER, max_tokens=4)
    engine.step()
    [last] = engine.engine.discard("victim", PlantedError("abort"))
    assert (last.request_id, last.finish_reason) == ("victim", "error")
    answers = engine.run(most_steps=100)
    assert (answers["other", 0].finish_reason, answers["other", 0].token_ids) == ("length", answer(OTHER, 4, 256))
