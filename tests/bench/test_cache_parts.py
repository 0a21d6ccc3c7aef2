"""The parts of `bench cache`: goals, counters, lengths, executors that stand for a model, a caching peer."""

from __future__ import annotations

import sys
from array import array
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest

from pagemill.base.errors import ConfigError
from pagemill.base.params import SamplingParams
from pagemill.base.step import SequenceStep, StepPlan
from pagemill.bench.cache import GROUPS, parse_rows
from pagemill.bench.cache_control import Answering, azure_like_lengths, eviction_decision_seconds
from pagemill.bench.cache_cost import CountedCache
from pagemill.bench.cache_curve import replayed_stats
from pagemill.bench.cache_figures import Figure
from pagemill.bench.peers_catalog import SCRIPTS
from pagemill.bench.report import Row
from pagemill.cache.entry import SharingConfig
from pagemill.cache.manager import CacheManager
from pagemill.simulator.trace import Request, Trace
from pagemill.simulator.workload import generate


@pytest.mark.parametrize(
    ("goals", "met"),
    [
        ({}, None),
        ({"at_most": 2.0}, True),
        ({"at_most": 1.9}, False),
        ({"at_least": 2.0}, True),
        ({"at_least": 3}, False),
    ],
)
def test_a_goal_is_held_against_the_median(goals: dict[str, Any], met: bool | None) -> None:
    figure = Figure("ttft", Row("work", "mode", "ms", (1.0, 2.0, 9.0)), **goals)
    assert figure.met is met
    assert figure.as_json()["met"] is met
    assert figure.as_json()["goal"] == (goals or None)


def test_rows_are_groups_by_name_all_unless_told() -> None:
    assert parse_rows(None) == tuple(GROUPS)
    assert parse_rows(" live,ttft, live") == ("live", "ttft")
    with pytest.raises(ConfigError, match="choose among ttft"):
        parse_rows("speed")


def test_lengths_are_those_of_the_trace_they_stand_for() -> None:
    lengths = azure_like_lengths(4000, seed=1)
    assert lengths == azure_like_lengths(4000, seed=1) != azure_like_lengths(4000, seed=2)
    assert median(prompt for prompt, _ in lengths) == pytest.approx(1020, rel=0.05)
    assert median(answer for _, answer in lengths) == pytest.approx(129, rel=0.08)
    assert min(min(each) for each in lengths) >= 1


def test_part_filled_blocks_of_a_row_are_counted() -> None:
    executor = Answering()
    params = SamplingParams(temperature=0)

    def row(num_blocks: int, start: int, *, sample: bool) -> SequenceStep:
        return SequenceStep(7, [1], start, array("i", range(num_blocks)), sample, params, 0)

    executor.run(StepPlan((row(2, 31, sample=True),)))
    assert executor.most_part_filled == 0
    [sample] = executor.run(StepPlan((row(9, 5, sample=False), row(3, 32, sample=True)))).samples
    assert (sample.seq_id, executor.most_part_filled) == (7, 1)
    executor.run(StepPlan((row(5, 40, sample=True),)))
    assert executor.most_part_filled == 3


def test_counted_calls_do_what_they_did_and_count_once() -> None:
    counted, plain = CountedCache(16, 4, SharingConfig()), CacheManager(16, 4, "paged", SharingConfig())
    tokens = array("i", range(13))
    for cache in (counted, plain):
        for seq_id in range(2):
            cache.open(seq_id, 13, 20, tokens)
            cache.commit(seq_id, 13)
            cache.close(seq_id)
        cache.verify()
    assert counted.stats() == plain.stats()
    assert counted.counter.num_calls == 6  # the tail that `close` publishes is part of closing
    assert counted.counter.seconds == pytest.approx(sum(counted.counter.by_call.values()))
    assert counted.counter.by_call.keys() == {"open", "commit", "close"}


def test_a_decision_takes_time() -> None:
    assert 0 < eviction_decision_seconds("lru", 500) < 0.01


def test_the_curve_of_a_replayed_trace_stands_beside_the_simulated_one() -> None:
    found = replayed_stats(generate("chat", 120, seed=2), 400, lambda text: None)
    points = found["curve"]["points"]
    assert [each["blocks"] for each in points] == [50, 100, 200, 400, 800, 1600, 3200]
    for each in points:
        assert each["hit_ratio"] == pytest.approx(each["simulated"], abs=0.01)
    assert found["tokens"]["hit_ratio"] == pytest.approx(points[3]["simulated"], abs=0.01)


def test_a_trace_without_blocks_has_no_curve() -> None:
    lengths = Trace("lengths", 0, (Request(0.0, 5, 5, ()),))
    with pytest.raises(ConfigError, match="no block ids"):
        replayed_stats(lengths, 10, lambda text: None)


def test_the_peer_computes_only_what_follows_the_common_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    """The script runs where llama.cpp is; here its calls are recorded in place of the library's."""
    removed: list[int] = []
    library = SimpleNamespace(
        llama_get_memory=lambda context: context, llama_memory_seq_rm=lambda memory, seq, at, to: removed.append(at)
    )
    monkeypatch.setitem(sys.modules, "llama_cpp", library)
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])
    import run_llama_cpp_cached as script  # type: ignore[import-not-found]

    decoded: list[list[int]] = []
    peer = script.CachingLlamaCpp.__new__(script.CachingLlamaCpp)
    peer._kept = {}
    peer._contexts = {(1, 256, alternative): object() for alternative in (0, 1)}

    def decode(context: Any, rows: list[tuple[int, int, int, bool]]) -> None:
        decoded.append([row[1] for row in rows])

    monkeypatch.setattr(peer, "_decode", decode)
    monkeypatch.setattr(peer, "_most_likely", lambda context, index: index)
    assert peer.generate([[1, 2, 3, 4]], 1, 0) == [1]
    peer.generate([[1, 2, 9, 4, 5]], 1, 0)
    peer.generate([[1, 2, 9, 4, 5]], 1, 0)
    peer.generate([[1, 2, 9]], 1, 1)
    assert removed == [0, 2, 4, 0]
    assert decoded == [[0, 1, 2, 3], [2, 3, 4], [4], [0, 1, 2]]
    for name in ("run_llama_cpp_cached", "run_llama_cpp", "worker_protocol"):
        sys.modules.pop(name, None)
