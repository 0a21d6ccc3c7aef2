"""The loop as a caller sees it: requests, choices, aborts, failures, marks, counts."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pagemill.base.clock import VirtualClock
from pagemill.base.errors import CapacityError, RequestError
from pagemill.base.params import SamplingParams
from pagemill.base.step import Sample, SampleFailure, StepPlan, StepResult
from pagemill.cache.manager import CacheManager, CacheMode
from pagemill.engine.admission import EngineLimits, derive_seed
from pagemill.engine.engine import Engine
from tests.fixtures.fake_engine import STEP_S, Rig
from tests.fixtures.fake_executor import FakeExecutor, InjectedFaultError, answer, decode_bytes

MODES: tuple[CacheMode, ...] = ("paged", "contiguous", "none")


def prompt(length: int, first: int = 1) -> list[int]:
    return [(first + i) % 256 for i in range(length)]


@pytest.mark.parametrize("mode", MODES)
def test_answer_is_the_specification_s(mode: CacheMode) -> None:
    rig = Rig(mode=mode)
    rig.add("a", prompt(9), max_tokens=12)
    rig.run()
    assert rig.tokens("a") == answer(prompt(9), 12, 256)
    assert rig.answers["a", 0].text == bytes(rig.tokens("a")).decode("utf-8", "replace")


def test_engine_without_requests_does_nothing() -> None:
    rig = Rig()
    assert not rig.engine.has_unfinished
    assert rig.step() == []
    assert (rig.executor.num_calls, rig.engine.stats().num_steps) == (0, 0)


def test_chunk_of_a_prompt_brings_no_delta() -> None:
    rig = Rig(max_num_batched_tokens=4)
    rig.add("a", prompt(10), max_tokens=2)
    assert [len(rig.step()) for _ in range(4)] == [0, 0, 1, 1]
    assert not rig.engine.has_unfinished


def test_many_requests_share_steps() -> None:
    rig = Rig(max_num_seqs=8, max_num_batched_tokens=256)
    for index in range(8):
        rig.add(f"r{index}", prompt(5 + index, index), max_tokens=10)
    rig.run()
    assert rig.engine.stats().num_steps == 10
    for index in range(8):
        assert rig.tokens(f"r{index}") == answer(prompt(5 + index, index), 10, 256)


def test_request_that_comes_later_joins_the_running_batch() -> None:
    rig = Rig()
    rig.add("a", prompt(4), max_tokens=10)
    for _ in range(3):
        rig.step()
    rig.add("b", prompt(4, 8), max_tokens=3)
    rig.run()
    assert rig.engine.stats().num_steps == 10


def test_choices_are_sequences_of_their_own() -> None:
    rig = Rig()
    rig.add("a", prompt(5), n=3, temperature=1.0, seed=7, max_tokens=6)
    rig.add("b", prompt(3), max_tokens=2)
    rig.run()
    assert sorted(rig.answers) == [("a", 0), ("a", 1), ("a", 2), ("b", 0)]
    for choice in range(3):
        assert rig.tokens("a", choice) == answer(prompt(5), 6, 256, seed=7, choice=choice)
    assert len({tuple(rig.tokens("a", choice)) for choice in range(3)}) == 3


def test_request_without_a_seed_gets_one_from_the_engine_s_by_its_number() -> None:
    rig = Rig(seed=42)
    for name in ("a", "b"):
        rig.add(name, prompt(5), temperature=1.0, seed=None, max_tokens=6)
    rig.run()
    assert rig.tokens("a") == answer(prompt(5), 6, 256, seed=derive_seed(42, 0))
    assert rig.tokens("b") == answer(prompt(5), 6, 256, seed=derive_seed(42, 1))


def test_refused_request_takes_no_seed_and_leaves_nothing() -> None:
    rig = Rig(max_model_len=16)
    for wrong in ([], prompt(16), [999]):
        with pytest.raises(RequestError):
            rig.add("a", wrong)
    rig.assert_empty()
    assert not rig.engine.has_unfinished
    rig.add("a", prompt(5), temperature=1.0, seed=None, max_tokens=6)
    rig.run()
    assert rig.tokens("a") == answer(prompt(5), 6, 256, seed=derive_seed(0, 0))


def test_check_request_raises_the_same_and_changes_nothing() -> None:
    rig = Rig(num_blocks=4)
    with pytest.raises(RequestError, match="empty"):
        rig.engine.check_request([], SamplingParams())
    with pytest.raises(CapacityError, match="5 blocks"):
        rig.engine.check_request(prompt(17), SamplingParams())
    rig.engine.check_request(prompt(16), SamplingParams())
    assert not rig.engine.has_unfinished


def test_request_id_in_use_is_refused_until_it_has_finished() -> None:
    rig = Rig()
    rig.add("a", prompt(3), max_tokens=1)
    with pytest.raises(RequestError, match="'a' is in use") as caught:
        rig.add("a", prompt(3))
    assert caught.value.status == 409
    rig.run()
    rig.answers.clear()
    rig.add("a", prompt(3), max_tokens=1)
    rig.run()


def test_end_of_text_ends_the_request_and_frees_its_blocks() -> None:
    whole = answer(prompt(6), 10, 256)
    rig = Rig(eos=(whole[4],))
    rig.add("a", prompt(6), max_tokens=10)
    rig.run()
    assert rig.tokens("a") == whole[: whole.index(whole[4]) + 1]
    assert rig.answers["a", 0].finish_reason == "stop"


def test_stops_are_forbidden_before_min_tokens_and_only_there() -> None:
    eos = tuple(range(0, 256, 2))
    rig = Rig(eos=eos)
    rig.add("a", prompt(6), max_tokens=40, min_tokens=12)
    rig.run()
    tokens = rig.tokens("a")
    assert tokens == answer(prompt(6), 40, 256, min_tokens=12, stop_ids=eos)
    assert len(tokens) > 12
    assert all(token % 2 for token in tokens[:-1])
    assert tokens[-1] in eos


def test_min_tokens_survives_preemption() -> None:
    eos = tuple(range(0, 256, 2))
    rig = Rig(num_blocks=8, eos=eos, max_num_batched_tokens=64)
    for index in range(2):
        rig.add(f"r{index}", prompt(4, index), max_tokens=24, min_tokens=22)
    rig.run()
    assert rig.engine.stats().num_preemptions >= 1
    for index in range(2):
        assert rig.tokens(f"r{index}") == answer(prompt(4, index), 24, 256, min_tokens=22, stop_ids=eos)


def test_logprobs_are_collected_for_each_token() -> None:
    rig = Rig()
    rig.add("a", prompt(4), max_tokens=3, logprobs=2)
    rig.run()
    for delta in rig.answers["a", 0].deltas:
        assert [entry.sampled.token_id for entry in delta.logprobs] == list(delta.token_ids)
        assert [entry.rank for entry in delta.logprobs[0].top] == [1, 2]


def test_marks_are_the_engine_clock_s() -> None:
    rig = Rig(max_num_batched_tokens=4, max_num_seqs=1)
    rig.clock.advance(5.0)
    rig.add("a", prompt(8), max_tokens=3)
    rig.add("b", prompt(4), max_tokens=1)
    rig.run()
    a, b = (rig.answers[name, 0].deltas[-1].marks for name in "ab")
    assert (a.arrival_s, a.scheduled_s) == (5.0, 5.0)
    assert a.first_token_s == pytest.approx(5.0 + STEP_S)
    assert a.finished_s == pytest.approx(5.0 + 3 * STEP_S)
    assert b.arrival_s == 5.0
    assert b.scheduled_s == b.first_token_s == b.finished_s == pytest.approx(5.0 + 4 * STEP_S)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_steps", [0, 1, 2, 4, 6])
def test_abort_in_any_state_leaks_nothing_and_changes_no_other(mode: CacheMode, num_steps: int) -> None:
    rig = Rig(mode=mode, max_model_len=64, max_num_seqs=3, max_num_batched_tokens=16)
    rig.add("keep", prompt(5), max_tokens=20)
    rig.add("drop", prompt(40, 3), n=2, temperature=1.0, max_tokens=20)
    rig.add("wait", prompt(4, 9), max_tokens=5)
    for _ in range(num_steps):
        rig.step()
    assert [(delta.choice, delta.finish_reason) for delta in rig.abort("drop")] == [(0, "abort"), (1, "abort")]
    rig.run()
    assert rig.tokens("keep") == answer(prompt(5), 20, 256)
    assert rig.tokens("wait") == answer(prompt(4, 9), 5, 256)


@pytest.mark.parametrize(("max_tokens", "num_waiting"), [(24, 0), (29, 1)], ids=["tail", "whole"])
def test_abort_of_a_preempted_request_leaks_nothing(max_tokens: int, num_waiting: int) -> None:
    rig = Rig(num_blocks=8, max_num_batched_tokens=64)
    rig.add("first", prompt(4, 1), max_tokens=max_tokens)
    rig.add("second", prompt(4, 9), max_tokens=24)
    while not rig.engine.stats().num_preemptions:
        rig.step()
    assert rig.engine.stats().num_waiting == num_waiting
    assert [delta.finish_reason for delta in rig.abort("second")] == ["abort"]
    rig.run()
    assert rig.tokens("first") == answer(prompt(4, 1), max_tokens, 256)


def test_abort_of_an_unknown_or_finished_request_does_nothing() -> None:
    rig = Rig()
    assert rig.abort("nobody") == []
    rig.add("a", prompt(3), max_tokens=1)
    rig.run()
    assert rig.abort("a") == []


def test_abort_of_one_finished_choice_reports_only_the_open_ones() -> None:
    probes = [answer(prompt(5), 12, 256, seed=7, choice=choice) for choice in range(2)]
    stop = next(token for token in probes[0][:6] if token not in probes[1])
    rig = Rig()
    rig.add("a", prompt(5), n=2, temperature=1.0, seed=7, max_tokens=12, stop_token_ids=(stop,))
    while not any(delta.finished for delta in rig.step()):
        pass
    assert [delta.choice for delta in rig.abort("a")] == [1]
    rig.assert_empty()


@pytest.mark.parametrize("mode", MODES)
def test_failed_step_fails_its_requests_and_the_engine_goes_on(mode: CacheMode) -> None:
    rig = Rig(mode=mode, max_model_len=64, max_num_seqs=3, fault=lambda call: call == 3)
    rig.add("a", prompt(5), max_tokens=10)
    rig.add("b", prompt(6), n=2, temperature=1.0, max_tokens=10)
    rig.add("waits", prompt(7), max_tokens=10)
    rig.run()
    for key in (("a", 0), ("b", 0), ("b", 1)):
        assert rig.answers[key].finish_reason == "error"
        assert isinstance(rig.answers[key].deltas[-1].error, InjectedFaultError)
        assert len(rig.answers[key].token_ids) == 3
    assert rig.tokens("waits") == answer(prompt(7), 10, 256)


def test_failed_step_fails_the_waiting_choices_of_its_requests_too() -> None:
    rig = Rig(max_num_seqs=1, fault=lambda call: call == 1)
    rig.add("a", prompt(5), n=2, temperature=1.0, max_tokens=4)
    rig.run()
    assert [rig.answers["a", choice].finish_reason for choice in range(2)] == ["error", "error"]


def test_executor_that_always_fails_fails_every_request_once() -> None:
    rig = Rig(max_num_seqs=2, fault=lambda call: True)
    for index in range(5):
        rig.add(f"r{index}", prompt(3, index))
    rig.run()
    assert rig.executor.num_calls == 3
    assert {answer.finish_reason for answer in rig.answers.values()} == {"error"}


class WrongSamples(FakeExecutor):
    """Answers for another sequence than was asked."""

    def run(self, plan: StepPlan) -> StepResult:
        result = super().run(plan)
        return StepResult(tuple(Sample(sample.seq_id + 1, sample.token_id) for sample in result.samples))


def test_samples_that_do_not_fit_the_plan_fail_the_step() -> None:
    rig = Rig()
    rig.engine._executor = WrongSamples(64, 4, 256)
    rig.add("a", prompt(3))
    rig.run()
    assert rig.answers["a", 0].finish_reason == "error"


def test_text_that_cannot_be_made_fails_its_own_request_only() -> None:
    def decode(token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        if not skip_special_tokens:
            raise UnicodeError("no text for you")
        return decode_bytes(token_ids, skip_special_tokens)

    rig = Rig(decode=decode)
    rig.add("a", prompt(3), max_tokens=5)
    rig.add("bad", prompt(4), n=2, temperature=1.0, max_tokens=5, skip_special_tokens=False)
    rig.add("b", prompt(5), max_tokens=5)
    rig.run()
    assert [rig.answers["bad", choice].finish_reason for choice in range(2)] == ["error", "error"]
    assert rig.tokens("a") == answer(prompt(3), 5, 256)
    assert rig.tokens("b") == answer(prompt(5), 5, 256)


class Interrupting(FakeExecutor):
    """Is interrupted in its third step, before or after the work."""

    def __init__(self, after: bool) -> None:
        super().__init__(64, 4, 256)
        self.after = after

    def run(self, plan: StepPlan) -> StepResult:
        if self.num_calls == 2 and not self.after:
            self.num_calls += 1
            raise KeyboardInterrupt
        return super().run(plan)


class InterruptedClock(VirtualClock):
    """Raises KeyboardInterrupt at one call of now()."""

    def __init__(self, at: int | None) -> None:
        super().__init__()
        self.calls_left = at

    def now(self) -> float:
        if self.calls_left is not None:
            self.calls_left -= 1
            if self.calls_left < 0:
                self.calls_left = None
                raise KeyboardInterrupt
        return super().now()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("after", [False, True])
def test_interrupted_step_is_repeated_and_loses_no_token(mode: CacheMode, after: bool) -> None:
    clock = InterruptedClock(at=7 if after else None)  # two requests, two steps and the third plan read it before
    cache = CacheManager(64, 4, mode)
    engine = Engine(Interrupting(after), cache, EngineLimits(128, 256), decode_bytes, clock)
    params = SamplingParams(temperature=0.0, seed=0, max_tokens=8)
    for name, length in (("a", 5), ("b", 7)):
        engine.add_request(name, prompt(length), params)
    tokens: dict[str, list[int]] = {"a": [], "b": []}
    interrupts = 0
    while engine.has_unfinished:
        try:
            for delta in engine.step():
                tokens[delta.request_id] += delta.token_ids
        except KeyboardInterrupt:
            interrupts += 1
        cache.verify()
    assert interrupts == 1
    assert tokens == {"a": answer(prompt(5), 8, 256), "b": answer(prompt(7), 8, 256)}
    assert cache.num_free_blocks == 64


def test_stats_count_steps_tokens_and_sequences() -> None:
    rig = Rig(max_num_seqs=2, max_num_batched_tokens=16)
    for index in range(3):
        rig.add(f"r{index}", prompt(4, index), max_tokens=3)
    rig.step()
    stats = rig.engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_steps, stats.num_computed_tokens) == (2, 1, 1, 8)
    assert stats.cache.num_active_blocks == 2
    rig.run()
    assert rig.engine.stats().num_computed_tokens == 3 * (4 + 2)


def test_work_of_a_decode_step_does_not_grow_with_the_history() -> None:
    rig = Rig(num_blocks=600, block_size=4, max_model_len=2400, max_num_batched_tokens=2400)
    rig.add("a", prompt(2000), max_tokens=5)
    rig.step()
    plan = rig.engine._scheduler.plan(0.0).step
    (row,) = plan.sequences
    assert (len(row.token_ids), row.start) == (1, 2000)
    assert row.block_table is rig.cache.block_table(row.seq_id), "the table is lent, not copied"
    rig.run()


def test_row_without_a_token_fails_its_own_request() -> None:
    """Logits of NaN in one row: its request ends with an error, the others keep their tokens."""

    class FailingRow(FakeExecutor):
        def run(self, plan: StepPlan) -> StepResult:
            result = super().run(plan)
            bad = {s.seq_id for s in plan.sequences if s.sample and s.token_ids[0] == 200}
            samples = tuple(s for s in result.samples if s.seq_id not in bad)
            return StepResult(samples, tuple(SampleFailure(seq_id, "NaN") for seq_id in sorted(bad)))

    cache = CacheManager(32, 16, "paged")
    limits = EngineLimits(max_model_len=64, vocab_size=256, max_num_seqs=4, max_num_batched_tokens=64)
    engine = Engine(FailingRow(32, 16, 256), cache, limits, decode_bytes, VirtualClock())
    for name, first in (("a", 1), ("bad", 200), ("c", 3)):
        engine.add_request(name, prompt(5, first), SamplingParams(max_tokens=6, temperature=0, ignore_eos=True))
    ends = {}
    tokens: dict[str, list[int]] = {"a": [], "bad": [], "c": []}
    while engine.has_unfinished:
        for delta in engine.step():
            tokens[delta.request_id] += delta.token_ids
            if delta.finished:
                ends[delta.request_id] = (delta.finish_reason, str(delta.error))
    assert ends == {"a": ("length", "None"), "bad": ("error", "NaN"), "c": ("length", "None")}
    assert tokens["a"] == answer(prompt(5, 1), 6, 256, seed=derive_seed(0, 0))
    assert tokens["c"] == answer(prompt(5, 3), 6, 256, seed=derive_seed(0, 2))
    assert cache.stats().num_free_blocks == 32
