"""Figures: the bound that a count of nothing gives, and sums over parts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.trust.figures import FLOORS, Figure, added, judged


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


def test_a_count_that_met_too_little_is_a_failure() -> None:
    leaks = Figure(
        "R5", "leaks, double frees or divergences", 0, 30_000, "operations", {"evictions": 1000, "hit": 1000}
    )
    assert judged(leaks) is leaks
    found = judged(replace(leaks, also={"evictions": 999, "hit": 0}, replays=["a leak"], num_failures=1))
    assert found.num_failures == 3
    assert found.replays[1:] == [
        "too little was met: 999 evictions, 1,000 at least", "too little was met: 0 hit, 1,000 at least",
    ]  # fmt: skip


def test_a_count_whose_name_has_gone_is_a_failure() -> None:
    crossed = Figure("S2", "hits across tenants", 0, 10, "look-ups", {"look-ups that hit": 6})
    assert judged(crossed) is crossed
    assert judged(replace(crossed, also={"look-ups that hit": 5})).num_failures == 1
    assert judged(replace(crossed, also={})).num_failures == 1


def test_nothing_that_ran_is_a_failure() -> None:
    assert judged(Figure("R15", "other requests changed", 0, 0, "planted exceptions")).num_failures == 1


def test_every_floor_is_of_a_figure_that_exists() -> None:
    """By its text: what a figure counts stands in the file that makes it."""
    sources = "".join(path.read_text() for path in Path(__file__).parent.glob("*.py") if path.stem != "figures")
    assert [what for _, what in FLOORS if f'"{what}"' not in sources] == []
