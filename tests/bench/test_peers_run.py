from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pagemill.base.errors import ConfigError
from pagemill.bench.peers_catalog import PAGEMILL, WORKS, Contestant, Work
from pagemill.bench.peers_run import Measurement, Settings, draw_prompts, measure
from pagemill.bench.peers_worker import Loaded
from tests.fixtures import fake_peer

SOURCE = str(Path(__file__).resolve().parents[2] / "src")
PREFILL, DECODE, START = Work("prefill", 1, 64, 1), Work("decode", 4, 16, 9), Work("start", 1, 8, 1)


def contestant(name: str, behaviour: str = "good") -> Contestant:
    command = (sys.executable, fake_peer.__file__)
    return Contestant(name, "x", command, "model.gguf", {"behaviour": behaviour}, python_path=SOURCE)


def settings(*works: Work, num_runs: int = 3) -> Settings:
    return Settings(works, num_runs, 1, 60.0, 1000)


class Log:
    """Mutated by what it is told. Answers that Ctrl-C was pressed after `limit` samples."""

    def __init__(self, limit: int = 1 << 30) -> None:
        self.order: list[tuple[str, str, int]] = []
        self.failures: list[str] = []
        self.limit = limit

    def loaded(self, contestant: Contestant, loaded: Loaded) -> None:
        pass

    def began(self, work: Work) -> None:
        pass

    def sampled(self, contestant: Contestant, work: Work, index: int, value: float) -> None:
        self.order.append((work.kind, contestant.engine, index))

    def failed(self, contestant: Contestant, reason: str) -> None:
        self.failures.append(f"{contestant.engine} {reason}")

    def is_over(self) -> bool:
        return len(self.order) >= self.limit


def samples(found: Measurement, row: int) -> dict[str, list[float]]:
    return {each.engine: values for each, values in found.rows[row].samples.items()}


def test_rates_are_prompt_tokens_and_further_tokens_over_their_time() -> None:
    found = measure([contestant("a")], settings(PREFILL, DECODE), Log())
    assert samples(found, 0)["a"] == pytest.approx([1000.0] * 3)
    assert samples(found, 1)["a"] == pytest.approx([4 * 8 / (8 * fake_peer.STEP_S)] * 3)
    assert len(found.rows[0].barriers) == 3
    assert not found.failures


def test_engines_take_turns() -> None:
    log = Log()
    measure([contestant("a"), contestant("b")], settings(PREFILL, num_runs=2), log)
    assert log.order == [("prefill", engine, run) for run in range(2) for engine in "ab"]


def test_the_faster_alternative_is_kept() -> None:
    found = measure([contestant("a", "alternatives")], settings(PREFILL), Log())
    assert set(found.rows[0].alternatives.values()) == {1}
    assert samples(found, 0)["a"] == pytest.approx([2000.0] * 3)


def test_many_streams_take_the_alternative_of_fewer() -> None:
    few, many = Work("decode", 2, 8, 5), Work("decode", 16, 8, 5)
    found = measure([contestant("a", "alternatives")], settings(few, many, num_runs=1), Log())
    assert [set(row.alternatives.values()) for row in found.rows] == [{1}, {1}]


def test_start_is_a_new_process_each_time_and_takes_real_seconds() -> None:
    found = measure([contestant("a")], settings(START, num_runs=2), Log())
    assert all(0.001 < value < 60.0 for value in samples(found, 0)["a"])


def test_engine_that_fails_is_left_out_with_its_reason_and_harms_no_other() -> None:
    log = Log()
    contestants = [contestant("bad", "crash later"), contestant("good"), contestant("never", "crash at load")]
    found = measure(contestants, settings(PREFILL, DECODE), log)
    assert len(samples(found, 0)["bad"]) == 2
    assert {name: len(values) for name, values in samples(found, 1).items()} == {"good": 3}
    assert {each.engine: why for each, why in found.failures.items()} == {
        "bad": "was ended by SIGSEGV: libraries print what they like",
        "never": "ended with code 3: no such model here",
    }
    assert [each.split()[0] for each in log.failures] == ["never", "bad"]


def test_no_row_is_begun_once_every_peer_has_failed() -> None:
    own = replace(contestant("x"), engine=PAGEMILL)
    found = measure([own, contestant("never", "crash at load")], settings(PREFILL, DECODE), Log())
    assert found.without_peers
    assert not found.rows
    found = measure([own, contestant("bad", "crash later")], settings(PREFILL, DECODE), Log())
    assert found.without_peers
    assert [row.work for row in found.rows] == [PREFILL]
    assert len(samples(found, 0)[PAGEMILL]) == 3
    assert measure([own, contestant("bad", "crash later")], settings(PREFILL), Log()).without_peers
    assert not measure([own, contestant("good")], settings(PREFILL), Log()).without_peers


def test_decode_time_that_does_not_grow_is_a_failure_and_no_figure() -> None:
    found = measure([contestant("a", "constant")], settings(DECODE), Log())
    assert not found.rows[0].samples
    assert next(iter(found.failures.values())).startswith("took no longer for 9 tokens than for one")


def test_ctrl_c_keeps_what_was_measured() -> None:
    log = Log(limit=3)
    found = measure([contestant("a"), contestant("b")], settings(PREFILL, DECODE), log, interrupted=log.is_over)
    assert found.interrupted
    assert [len(values) for values in samples(found, 0).values()] == [2, 1]
    assert len(found.rows) == 1


def test_prompts_are_distinct_per_stream_and_the_same_for_the_same_key() -> None:
    prompts = draw_prompts(WORKS[4], (0, 4, 1, 129), 49_152)
    assert [len(prompt) for prompt in prompts] == [256] * 32
    assert len({tuple(prompt) for prompt in prompts}) == 32
    assert prompts == draw_prompts(WORKS[4], (0, 4, 1, 129), 49_152)
    assert prompts != draw_prompts(WORKS[4], (0, 4, 2, 129), 49_152)
    assert all(256 <= token < 49_152 for prompt in prompts for token in prompt)


@pytest.mark.parametrize(("runs", "timeout_s", "message"), [(0, 60.0, "--runs is 0"), (3, 0.0, "--timeout is 0")])
def test_settings_that_cannot_be_are_refused(runs: int, timeout_s: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings((PREFILL,), runs, 1, timeout_s, 1000)
