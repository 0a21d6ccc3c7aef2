"""Who cannot end by its deadline any more goes behind the others of its queue, and nobody else is touched by that."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pagemill.base.errors import DeadlineError, IntegrityError
from pagemill.base.params import CacheOptions, SamplingParams
from pagemill.cache.entry import SharingConfig
from pagemill.engine.entering import MOST_PASSED
from pagemill.engine.lateness import MOST_CAUTION, Pace
from pagemill.engine.output import Delta
from pagemill.engine.request import Marks, Request, Sequence
from tests.fixtures.fake_engine import STEP_S, Rig


def asked(num_prompt: int = 10, max_tokens: int = 5, generated: int = 0, **params: object) -> Sequence:
    """A sequence of a request that arrived at 0 and ignores the end of text unless told otherwise."""
    chosen = SamplingParams(**{"ignore_eos": True, "max_tokens": max_tokens, **params})  # type: ignore[arg-type]
    prompt = array("i", range(num_prompt))
    request = Request("r", prompt, chosen, 0, max_tokens, (), 0.0)
    return Sequence(1, request, 0, prompt + array("i", [0] * generated), Marks(0.0))


def test_the_estimate_is_the_prompt_at_the_speed_of_reading_and_a_step_for_each_further_token() -> None:
    pace = Pace()
    for _ in range(50):
        pace.saw(8, 100, 0.05)
    assert pace.seconds(asked(max_tokens=21), 300) == pytest.approx(300 * 0.05 / 100 + 20 * 0.05)
    for _ in range(2000):
        pace.saw(8, 0, 0.01)
    assert pace.seconds(asked(max_tokens=21), 0) == pytest.approx(20 * 0.01, rel=0.01), "steps became shorter"
    assert pace.seconds(asked(max_tokens=1), 300) == pytest.approx(0.15), "and none told how prompts are read by now"


def test_nothing_is_foretold_before_a_step_was_seen() -> None:
    pace = Pace()
    pace.saw(8, 100, 0.0)
    assert pace.seconds(asked(max_tokens=1000), 10_000) == 0


def test_an_answer_that_may_end_sooner_is_expected_to_be_as_long_as_answers_were() -> None:
    pace = Pace()
    for fields in ({"ignore_eos": False}, {"stop": ("x",)}, {"stop_token_ids": (7,)}):
        assert pace.num_expected(asked(max_tokens=100, **fields)) == 1
    assert pace.num_expected(asked(max_tokens=100)) == 100
    assert pace.num_expected(asked(max_tokens=100, ignore_eos=False, min_tokens=30)) == 30
    for _ in range(60):
        pace.ended(asked(generated=40), 1.0)
    assert pace.num_expected(asked(max_tokens=100, ignore_eos=False)) == pytest.approx(40)
    assert pace.num_expected(asked(max_tokens=8, ignore_eos=False)) == 8


def test_whoever_entered_in_time_and_was_late_makes_the_estimate_more_careful() -> None:
    pace = Pace()
    pace.saw(1, 10, 0.1)
    before = pace.seconds(asked(), 10)
    pace.ended(asked(deadline_s=1.0), 2.0)
    assert pace.seconds(asked(), 10) > before
    for _ in range(100):
        pace.ended(asked(deadline_s=1.0), 2.0)
    assert pace.caution == MOST_CAUTION
    for _ in range(1000):
        pace.ended(asked(deadline_s=1.0), 0.5)
    assert pace.caution == 1.0
    late = asked(deadline_s=1.0)
    late.is_late = True
    pace.ended(late, 2.0)
    pace.ended(asked(), 2.0)
    assert pace.caution == 1.0, "of those it said so, and the others had no deadline"


class TimedRig(Rig):
    """A rig whose steps take their time while they are computed, so that the engine sees it. Mutated as a Rig is."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.executor._fault = self._spend

    def _spend(self, call: int) -> bool:
        self.clock.advance(STEP_S)
        return False

    def step(self) -> list[Delta]:
        calls = self.executor.num_calls
        deltas = self.engine.step()
        if self.executor.num_calls == calls:
            self.clock.advance(STEP_S)
        self._take(deltas)
        return deltas


def learned(**options: object) -> Rig:
    """An engine with one place which has seen that a step takes STEP_S, with 32 prompt tokens in it at the most."""
    rig = TimedRig(**{"max_num_seqs": 1, "num_blocks": 256, **options})
    for index in range(3):
        rig.add(f"before{index}", [index] * 32, max_tokens=12, ignore_eos=True)
    rig.run()
    return rig


def order(rig: Rig, *names: str) -> list[str]:
    """Names of those that got a first token, by its time."""
    rig.run()
    marks = {name: rig.answers[name, 0].deltas[-1].marks for name in names}
    began = [name for name in names if marks[name].scheduled_s is not None]
    return sorted(began, key=lambda name: marks[name].scheduled_s or 0.0)


def timed(rig: Rig, name: str, max_tokens: int, steps: float | None, tenant: str = "default", **params: object) -> None:
    """Queue a request whose deadline is so many steps away."""
    deadline_s = None if steps is None else steps * STEP_S
    prompt = [ord(each) for each in name]
    rig.add(name, prompt, CacheOptions(tenant=tenant), max_tokens=max_tokens, ignore_eos=True, deadline_s=deadline_s,
            **params)  # fmt: skip


def test_a_request_that_will_be_late_lets_those_behind_it_go_first_and_ends_at_its_deadline() -> None:
    rig = learned()
    timed(rig, "late", 40, 30)
    timed(rig, "good", 20, 30)
    timed(rig, "any", 5, None)
    assert order(rig, "late", "good", "any") == ["good", "any", "late"]
    assert rig.answers["good", 0].finish_reason == "length"
    error = rig.answers["late", 0].deltas[-1].error
    assert isinstance(error, DeadlineError)
    assert "its time ended after" in str(error), "it ran once nobody else waited"


def test_a_request_that_has_time_enough_keeps_its_place() -> None:
    rig = learned()
    for index in range(4):
        timed(rig, f"{index}", 10, 60)
    timed(rig, "4", 10, None)
    assert order(rig, "0", "1", "2", "3", "4") == ["0", "1", "2", "3", "4"]
    assert all(rig.answers[f"{index}", 0].finish_reason == "length" for index in range(5))


def test_what_is_in_the_cache_is_not_counted_as_to_be_read() -> None:
    for sharing, first in ((None, "other"), (SharingConfig(), "long")):
        rig = learned(sharing=sharing, max_num_batched_tokens=4)
        prompt = list(range(96))
        rig.add("before", prompt, max_tokens=1)
        rig.run()
        rig.add("long", prompt, max_tokens=2, ignore_eos=True, deadline_s=16 * STEP_S)
        timed(rig, "other", 2, None)
        assert order(rig, "long", "other")[0] == first


def test_one_tenant_s_late_requests_change_nothing_for_another() -> None:
    rig = learned()
    timed(rig, "late", 40, 20, tenant="a")
    timed(rig, "good", 5, None, tenant="a")
    timed(rig, "x", 5, None, tenant="b")
    timed(rig, "y", 5, None, tenant="b")
    names = order(rig, "late", "good", "x", "y")
    assert names.index("x") < names.index("y")
    assert names[:2] in (["good", "x"], ["x", "good"]), "turns go by tenants as ever"


def test_a_long_queue_of_late_requests_is_passed_at_once_by_one_that_is_not() -> None:
    rig = learned()
    for index in range(50):
        timed(rig, f"late{index}", 60, 40)
    timed(rig, "good", 10, 40)
    rig.step()
    assert [row.seq_id for row in rig.rows[-1]] == [3 + 51]
    rig.run()
    assert rig.answers["good", 0].finish_reason == "length"


def test_a_late_request_passes_nobody_for_what_is_in_the_cache_of_its_text() -> None:
    rig = learned(sharing=SharingConfig())
    rig.add("before", range(96), max_tokens=1)
    rig.run()
    rig.add("late", range(97), max_tokens=40, ignore_eos=True, deadline_s=30 * STEP_S)
    timed(rig, "good", 20, None)
    timed(rig, "any", 5, None)
    assert order(rig, "late", "good", "any") == ["good", "any", "late"]


def test_a_rebuilt_cache_leaves_late_ones_behind_the_others() -> None:
    rig = learned(num_blocks=64)
    timed(rig, "late", 60, 40)
    timed(rig, "good", 30, 40)
    rig.step()
    rig.engine._damage = IntegrityError("found in a test")
    rig.num_rebuilds = 1
    assert order(rig, "late", "good")[0] == "good"


requests = st.tuples(st.integers(1, 20), st.sampled_from([None, 15, 40, 100]))
COMMON = list(range(200, 220))  # a text that is in the cache before anybody asks, in blocks of 4


def begun(rig: Rig, prompts: list[list[int]], drawn: list[tuple[int, int | None]], *, deadlines: bool) -> list[float]:
    """When each of the requests without a deadline entered, with or without the deadlines of the others."""
    for index, ((max_tokens, steps), prompt) in enumerate(zip(drawn, prompts, strict=True)):
        deadline_s = steps * STEP_S if deadlines and steps is not None else None
        rig.add(f"{index}", prompt, max_tokens=max_tokens, ignore_eos=True, deadline_s=deadline_s)
    rig.run()
    marks = [rig.answers[f"{index}", 0].deltas[-1].marks for index, (_, steps) in enumerate(drawn) if steps is None]
    return [each.scheduled_s for each in marks if each.scheduled_s is not None]


# Request 11 ends in the queue; with what it finds in the cache it would have passed those before it, and 12 then too.
PLACE_THAT_PASSES = [((1, None), 0)] * 3 + [((12, None), 0), ((2, None), 0)] + [((1, None), 0)] * 6
PLACE_THAT_PASSES += [((1, 15), 1), ((1, None), 1)]


@given(st.lists(st.tuples(requests, st.integers(0, 4)), min_size=1, max_size=25), st.integers(1, 3), st.booleans())
@example(PLACE_THAT_PASSES, 1, True)
@settings(max_examples=30, deadline=None)
def test_deadlines_of_others_cost_a_request_without_one_no_time(
    drawn: list[tuple[tuple[int, int | None], int]], places: int, shared: bool
) -> None:
    """All with and without their deadlines: whoever has none enters no later, for those who will be late go behind it
    and those whose time is over go. Who finds more of its text in the cache passes it as without deadlines."""
    prompts = [[*COMMON[: 4 * num_found], index] for index, (_, num_found) in enumerate(drawn)]

    def entered(*, deadlines: bool) -> list[float]:
        rig = learned(num_blocks=512, max_num_seqs=places, sharing=SharingConfig() if shared else None)
        rig.add("common", COMMON, max_tokens=1)
        rig.run()
        return begun(rig, prompts, [each for each, _ in drawn], deadlines=deadlines)

    with_s, without_s = entered(deadlines=True), entered(deadlines=False)
    assert len(with_s) == len(without_s) == sum(steps is None for (_, steps), _ in drawn)
    assert all(after <= before + 1e-9 for before, after in zip(without_s, with_s, strict=True))


# Request 19 ends in the queue, where 20 is one place too far behind 12 to pass it for what is in the cache of its text.
PASSED = [(1, None), (4, None), *[(1, None)] * 17, (1, 15), (1, None)]
# The same where 19 is found to be late before its time is over.
GONE_BACK = [(1, None), (4, None), *[(1, None)] * 17, (20, 25), (1, None)]


@pytest.mark.parametrize("drawn", [PASSED, GONE_BACK])
def test_nobody_comes_within_reach_of_another_because_one_between_them_has_gone(
    drawn: list[tuple[int, int | None]],
) -> None:
    prompts = [[ord(each) for each in f"{index}"] for index in range(len(drawn))]
    with_s, without_s = (
        begun(learned(max_num_seqs=1, sharing=SharingConfig()), prompts, drawn, deadlines=deadlines)
        for deadlines in (True, False)
    )
    assert all(after <= before + 1e-9 for before, after in zip(without_s, with_s, strict=True))


@given(st.lists(requests, min_size=1, max_size=25), st.integers(1, 3))
@settings(max_examples=15, deadline=None)
def test_texts_that_deadlines_keep_out_of_the_cache_cost_no_more_than_being_passed(
    drawn: list[tuple[int, int | None]], places: int
) -> None:
    """Texts that begin with others' texts: one that has ended at its deadline, or was not read, is not found."""
    prompts = [[ord(each) for each in f"{index}"] for index in range(len(drawn))]
    with_s, without_s = (
        begun(learned(max_num_seqs=places, sharing=SharingConfig()), prompts, drawn, deadlines=deadlines)
        for deadlines in (True, False)
    )
    passing_s = 2 * MOST_PASSED * (max(max_tokens for max_tokens, _ in drawn) + 1) * STEP_S
    assert all(after <= before + passing_s + 1e-9 for before, after in zip(without_s, with_s, strict=True))


@given(st.lists(st.integers(1, 4), min_size=2, max_size=30), st.integers(5, 80), st.integers(1, 4), st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_equal_requests_with_equal_deadlines_are_served_in_the_order_of_arrival(
    bursts: list[int], steps: int, places: int, max_tokens: int
) -> None:
    """Requests that differ in nothing but arrival and must end at one moment, some of them too late for it."""
    rig = learned(max_num_seqs=places)
    end_s = rig.clock.now() + steps * STEP_S
    names: list[str] = []
    for burst in bursts:
        for _ in range(burst):
            if (left_s := end_s - rig.clock.now()) > 0:
                names.append(f"r{len(names):03}")
                timed(rig, names[-1], max_tokens, left_s / STEP_S)
        rig.step()
    rig.run()
    marks = [rig.answers[name, 0].deltas[-1].marks.scheduled_s for name in names]
    began = [each for each in marks if each is not None]
    assert began == sorted(began)
    assert marks[: len(began)] == began, "whoever came later never begins where one before it did not"


@given(st.lists(st.tuples(requests, st.sampled_from("ab")), min_size=1, max_size=25), st.integers(1, 3))
@settings(max_examples=15, deadline=None)
def test_the_same_requests_are_served_the_same_way_again(
    drawn: list[tuple[tuple[int, int | None], str]], places: int
) -> None:
    def rows() -> list[object]:
        rig = learned(max_num_seqs=places)
        for index, ((max_tokens, steps), tenant) in enumerate(drawn):
            timed(rig, f"{index}", max_tokens, steps, tenant=tenant)
        rig.run()
        return list(rig.rows)

    assert rows() == rows()
