"""What is counted of requests as a real engine's deltas come, over a fake executor and a virtual clock."""

from __future__ import annotations

from typing import get_args

import pytest

from pagemill.base.params import CacheOptions
from pagemill.cache.entry import SharingConfig
from pagemill.cache.receipt import Reason
from pagemill.telemetry.metrics import Metrics, Sample
from pagemill.telemetry.observe import MISS_REASONS, EngineObserver, Finished, miss_label
from pagemill.telemetry.trace import RequestTrace
from tests.fixtures.fake_engine import STEP_S, Rig


class Watched:
    """A rig whose deltas are observed. Mutated by `run`."""

    def __init__(self, **options: object) -> None:
        self.rig = Rig(sharing=SharingConfig(), **options)  # type: ignore[arg-type]
        self.metrics = Metrics("tiny")
        self.finished: list[Finished] = []
        self.observer = EngineObserver(self.metrics, self._finish)

    def _finish(self, done: Finished, trace: RequestTrace | None) -> None:
        self.finished.append(done)

    def add(self, request_id: str, prompt: list[int], *, tell: bool = True, **params: object) -> None:
        self.rig.add(request_id, prompt, **params)  # type: ignore[arg-type]
        if tell:
            self.observer.added(request_id, len(prompt), int(params.get("n", 1)))  # type: ignore[call-overload]

    def run(self) -> None:
        engine, clock = self.rig.engine, self.rig.clock
        while engine.has_unfinished:
            deltas = engine.step()
            clock.advance(STEP_S)
            self.observer.stepped(deltas, clock.now())

    def one(self, name: str, *labels: str) -> Sample:
        return next(each for each in self.metrics[name].samples() if each.labels == labels)

    def value(self, name: str, *labels: str) -> float:
        return self.one(name, *labels).value

    def count(self, name: str) -> int:
        return sum(self.one(name).counts)


def test_a_request_is_counted_once_with_all_its_tokens() -> None:
    watched = Watched()
    watched.add("a", list(range(10)), max_tokens=5)
    watched.run()
    assert watched.value("vllm:prompt_tokens") == 10
    assert watched.value("vllm:generation_tokens") == 5
    assert watched.value("vllm:request_success", "length") == 1
    assert watched.count("vllm:time_to_first_token_seconds") == 1
    assert watched.count("vllm:inter_token_latency_seconds") == 4
    assert watched.value("vllm:inter_token_latency_seconds") == pytest.approx(4 * STEP_S)
    assert watched.observer.num_open == 0


def test_a_prompt_is_counted_when_it_was_read_and_not_when_its_answer_ends() -> None:
    watched = Watched()
    watched.add("a", list(range(10)), max_tokens=30)
    for _ in range(3):
        watched.observer.stepped(watched.rig.engine.step(), watched.rig.clock.now())
    assert watched.value("vllm:prompt_tokens") == 10
    watched.observer.stepped(watched.rig.engine.abort("a"), watched.rig.clock.now())
    assert watched.value("vllm:prompt_tokens") == 10, "once"


def test_the_stages_of_a_request_add_up() -> None:
    watched = Watched(max_num_seqs=1)
    for name in ("a", "b"):
        watched.add(name, list(range(8)), max_tokens=4)
    watched.run()
    for done in watched.finished:
        assert done.scheduled_s is not None
        assert done.first_token_s is not None
        assert done.arrival_s <= done.scheduled_s <= done.first_token_s <= done.finished_s
    total = watched.value("vllm:e2e_request_latency_seconds")
    parts = sum(watched.value(f"vllm:request_{stage}_time_seconds") for stage in ("queue", "prefill", "decode"))
    assert parts == pytest.approx(total)
    assert watched.value("vllm:request_queue_time_seconds") > 0, "the second waited for the first"


def test_hits_and_misses_are_told_by_tokens_and_reason() -> None:
    watched = Watched()
    watched.add("a", list(range(20)), max_tokens=2)
    watched.run()
    watched.add("b", list(range(20)), max_tokens=2)
    watched.run()
    watched.add("c", [*range(10), *range(100, 110)], max_tokens=2)
    watched.run()
    hits = watched.value("pagemill:kv_lookup_tokens", "hot", "hit")
    assert hits == watched.value("vllm:prompt_tokens_by_source", "local_cache_hit") == 19 + 10
    assert watched.value("vllm:prompt_tokens_by_source", "local_compute") == 60 - hits
    assert watched.value("pagemill:kv_miss", "not_seen") == 1
    assert watched.value("pagemill:kv_miss", "differs") == 1
    assert [done.miss for done in watched.finished] == ["not_seen", None, "differs"]


def test_a_request_of_several_choices_is_one_request() -> None:
    watched = Watched()
    watched.add("a", list(range(6)), max_tokens=3, n=3, temperature=1.0)
    watched.run()
    assert watched.value("vllm:request_success", "length") == 1
    assert watched.value("vllm:generation_tokens") == 9
    assert watched.count("vllm:time_to_first_token_seconds") == 1
    [done] = watched.finished
    assert (done.num_choices, done.num_generated, done.num_prompt_tokens) == (3, 9, 6)


def test_an_abort_is_counted_with_its_reason() -> None:
    watched = Watched()
    watched.add("a", list(range(6)), max_tokens=30)
    watched.observer.stepped(watched.rig.engine.step(), watched.rig.clock.now())
    watched.observer.stepped(watched.rig.engine.abort("a"), watched.rig.clock.now())
    assert watched.value("vllm:request_success", "abort") == 1
    assert watched.observer.num_open == 0


def test_an_abort_before_it_ran_has_no_times_of_running() -> None:
    watched = Watched()
    watched.add("a", list(range(6)), max_tokens=30)
    watched.observer.stepped(watched.rig.engine.abort("a"), watched.rig.clock.now())
    assert watched.count("vllm:request_queue_time_seconds") == 0
    assert watched.value("vllm:prompt_tokens") == 0
    [done] = watched.finished
    assert (done.scheduled_s, done.first_token_s, done.finish_reason) == (None, None, "abort")


def test_deltas_that_come_before_their_request_is_named_are_counted_once_it_is() -> None:
    watched = Watched()
    watched.add("a", list(range(6)), tell=False, max_tokens=1)
    watched.run()
    assert watched.value("vllm:generation_tokens") == 0
    watched.observer.added("a", 6)
    assert watched.value("vllm:generation_tokens") == 1
    assert watched.value("vllm:request_success", "length") == 1
    assert watched.observer.num_open == 0


def test_deltas_that_nobody_names_are_forgotten_in_the_end() -> None:
    watched = Watched()
    for number in range(3000):
        watched.add(f"lost-{number}", [1, 2], tell=False, max_tokens=1)
        if number % 8 == 7:
            watched.run()
    assert watched.observer.num_early <= 1024


def test_a_request_that_shares_nothing_is_counted_too() -> None:
    watched = Watched()
    watched.rig.add("a", list(range(9)), CacheOptions(bypass=True), max_tokens=2)
    watched.observer.added("a", 9)
    watched.run()
    assert watched.value("vllm:prompt_tokens_by_source", "local_compute") == 9
    assert watched.value("pagemill:kv_miss", "bypassed") == 1


def test_every_reason_has_its_series_from_the_start() -> None:
    watched = Watched()
    assert {each.labels[0] for each in watched.metrics["pagemill:kv_miss"].samples()} == set(MISS_REASONS)


def test_labels_are_the_reasons_that_receipts_give() -> None:
    assert {miss_label(each) for each in get_args(Reason)} == set(MISS_REASONS)
    assert miss_label(None) is None
