"""Figures: the bound that a count of nothing gives, and sums over parts."""

from __future__ import annotations

from tests.trust.figures import Figure, added


def test_no_failure_bounds_the_rate_at_three_by_n() -> None:
    assert Figure("R5", "leaks", 0, 30_000, "operations").bound == "< 1.0e-04"


def test_a_failure_gives_the_rate_itself_and_its_replay() -> None:
    figure = Figure("R14", "bugs", 1, 200, "seeds", {}, ["replay 7"])
    assert figure.bound == "5.0e-03"
    assert str(figure).endswith("     replay 7")


def test_nothing_that_ran_bounds_nothing() -> None:
    assert Figure("R5", "leaks", 0, 0, "operations").bound == "nothing ran"


def test_parts_are_added_and_come_back_from_json() -> None:
    parts = [
        Figure("S2", "hits", 0, 10, "look-ups", {"hit": 2}),
        Figure("S2", "hits", 1, 5, "look-ups", {"hit": 1}, ["x"]),
    ]
    [whole] = added(Figure.decode(each.encode()) for each in parts)
    assert (whole.num_failures, whole.num_trials, whole.also, whole.replays) == (1, 15, {"hit": 3}, ["x"])
