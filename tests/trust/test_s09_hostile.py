"""S9: no request that the schema allows or forbids, and no chain of them, is answered as our mistake."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.trust.figures import Figure

if "CI" not in os.environ:
    pytest.importorskip("schemathesis", reason="pip install schemathesis, or `make trust-ci`")

from tests.trust import hostile

CASES = 750


@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", range(2))
def test_no_case_is_answered_wrongly(part: int, publish: Callable[[Figure], None]) -> None:
    figures = hostile.count(part, CASES)
    for figure in figures:
        publish(figure)
    [counted, watched] = figures
    assert counted.num_trials >= CASES
    assert min(counted.also[kind] for kind in ("positive", "negative", "in chains", "methods", "2xx", "4xx")) > 20
    assert watched.num_trials == counted.num_trials


class Told:
    """An answer as clients of it see one."""

    def __init__(self, status: int, content: bytes) -> None:
        self.status_code = status
        self.content = content
        self.request = self
        self.method = "POST"


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        (Told(200, b"{}"), ""), (Told(400, b'{"error": {"message": "n is 5"}}'), ""), (Told(400, b"{}"), "message"),
        (Told(404, b"<html>"), "message"), (Told(500, b'{"error": {"message": "ours"}}'), "500"), (None, "no whole"),
    ],
)  # fmt: skip
def test_a_wrong_answer_is_one_of_ours_a_hang_or_an_error_without_a_message(answer: object, wrong: str) -> None:
    tally = hostile.Tally()
    tally.took("positive", answer, "POST /x")
    assert bool(tally.wrong) == bool(wrong)
    assert wrong in "".join(tally.wrong)


def test_an_answer_that_comes_behind_its_own_deadline_is_no_mistake_of_ours() -> None:
    late, tally = Told(504, b'{"error": {"message": "late"}}'), hostile.Tally()
    tally.took("positive", late, "POST /x {'deadline_s': 5.4e-147}")
    assert not tally.wrong
    for given in ("None", "60", "1.5e3"):
        tally.took("positive", late, f"POST /x {{'deadline_s': {given}}}")
    assert len(tally.wrong) == 3
