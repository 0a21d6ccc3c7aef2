"""Requests end when their time is over, in whatever state, and leave nothing behind."""

from __future__ import annotations

import pytest

from pagemill.base.errors import DeadlineError
from pagemill.engine.deadlines import Deadlines
from tests.fixtures.fake_engine import STEP_S, Rig
from tests.fixtures.fake_executor import answer


def error_of(rig: Rig, name: str, choice: int = 0) -> Exception | None:
    return rig.answers[name, choice].deltas[-1].error


def test_a_running_request_ends_at_its_deadline_and_keeps_what_it_said() -> None:
    rig = Rig()
    rig.add("late", [1, 2, 3], max_tokens=100, deadline_s=5.5 * STEP_S)
    rig.add("other", [4, 5, 6], max_tokens=20)
    rig.run()
    error = error_of(rig, "late")
    assert isinstance(error, DeadlineError)
    assert error.status == 504
    assert "its time ended after 6 generated tokens" in str(error)
    assert rig.tokens("late") == answer([1, 2, 3], 6, 256)
    assert rig.tokens("other") == answer([4, 5, 6], 20, 256)
    assert rig.engine.stats().num_expired == 1


def test_a_waiting_request_ends_at_its_deadline() -> None:
    rig = Rig(max_num_seqs=1)
    rig.add("runs", [1, 2, 3], max_tokens=30)
    rig.add("waits", [4, 5], max_tokens=3, deadline_s=10 * STEP_S)
    rig.run()
    assert "while it waited" in str(error_of(rig, "waits"))
    assert rig.tokens("waits") == []
    assert rig.answers["runs", 0].finish_reason == "length"


@pytest.mark.parametrize("max_tokens", [24, 29], ids=["tail dropped", "sent back"])
def test_a_preempted_request_ends_at_its_deadline(max_tokens: int) -> None:
    rig = Rig(num_blocks=8, max_num_batched_tokens=64)
    rig.add("first", [1, 2, 3, 4], max_tokens=max_tokens)
    rig.add("second", [5, 6, 7, 8], max_tokens=24, deadline_s=20 * STEP_S)
    rig.run()
    assert rig.engine.stats().num_preemptions
    assert isinstance(error_of(rig, "second"), DeadlineError)
    assert rig.tokens("first") == answer([1, 2, 3, 4], max_tokens, 256)


def test_every_choice_of_a_request_ends() -> None:
    rig = Rig(max_num_seqs=2)
    rig.add("many", [1, 2, 3], n=4, temperature=1.0, max_tokens=50, deadline_s=10 * STEP_S)
    rig.run()
    assert all(isinstance(error_of(rig, "many", choice), DeadlineError) for choice in range(4))


def test_a_request_that_finishes_in_time_is_left_alone() -> None:
    rig = Rig()
    rig.add("quick", [1, 2, 3], max_tokens=4, deadline_s=1000.0)
    rig.run()
    rig.clock.advance(2000.0)
    rig.add("next", [1, 2], max_tokens=2)
    rig.run()
    assert rig.answers["quick", 0].finish_reason == rig.answers["next", 0].finish_reason == "length"


def test_deadlines_of_finished_requests_do_not_pile_up() -> None:
    rig = Rig()
    deadlines: Deadlines = rig.engine._scheduler._deadlines
    for index in range(1000):
        rig.add(f"r{index}", [1, 2], max_tokens=1, deadline_s=1e6)
        rig.step()
    assert len(deadlines._heap) <= 65
    rig.assert_empty()


def test_deadlines_are_live_as_long_as_their_requests() -> None:
    rig = Rig(max_num_seqs=1)
    deadlines: Deadlines = rig.engine._scheduler._deadlines
    rig.add("none", [1, 2], max_tokens=3)
    assert deadlines.num_live == 0
    rig.add("first", [1, 2, 3], max_tokens=2, deadline_s=1e6)
    rig.add("second", [4, 5], max_tokens=2, deadline_s=3 * STEP_S)
    assert deadlines.num_live == 2
    rig.run()
    assert rig.engine.stats().num_expired == 1
    assert (deadlines.num_live, deadlines._heap) == (0, [])
