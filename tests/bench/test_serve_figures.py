"""Definitions of the figures of `bench serve`, on made-up times."""

from __future__ import annotations

from typing import Any

import pytest

from pagemill.base.errors import ConfigError
from pagemill.bench.serve_figures import LoadFigures, Objective, figures_of

OBJECTIVE = Objective(ttft_s=1.0, itl_s=0.1)


def request(due_s: float, times: list[float], **changed: Any) -> dict[str, Any]:
    ended = {"end_s": times[-1] if times else None, "finish_reason": "length" if times else None}
    usage = {"prompt_tokens": 10, "completion_tokens": len(times), "prompt_tokens_details": {"cached_tokens": 4}}
    found = {"session": 0, "turn": 0, "max_tokens": len(times), "due_s": due_s, "sent_s": due_s, "times": times}
    return {**found, **ended, "usage": usage if times else None, "error": None, **changed}


def figures(*requests: dict[str, Any], warmup_s: float = 0.0, idle_s: float | None = None) -> LoadFigures:
    told = {"begin_s": 0.0, "end_s": 10.0, "idle_s": idle_s, "cpu_s": 0.2, "requests": list(requests)}
    return figures_of(told, warmup_s, OBJECTIVE, 5.0)


def test_tokens_and_times_count_in_the_window_alone() -> None:
    found = figures(request(0.0, [1.0, 3.0, 4.0]), request(2.0, [2.5, 2.6]), warmup_s=2.0)
    assert found.window_s == 8.0
    assert found.tokens_per_s == pytest.approx(4 / 8)
    assert found.ttft_s == pytest.approx((0.5,))
    assert found.itl_s == pytest.approx((2.0, 1.0, 0.1))
    assert found.requests_per_s == pytest.approx(2 / 8)


def test_window_ends_when_a_user_has_nothing_left_to_ask() -> None:
    found = figures(request(0.0, [1.0, 3.0]), request(2.0, [2.5, 6.0]), idle_s=3.0)
    assert found.window_s == 3.0
    assert found.tokens_per_s == pytest.approx(1.0)
    assert figures(request(0.0, [0.5]), warmup_s=2.0, idle_s=1.0).tokens_per_s == pytest.approx(1.0)


def test_events_of_several_tokens_count_as_what_the_server_says_they_were() -> None:
    usage = {"prompt_tokens": 1, "completion_tokens": 6}
    assert figures(request(0.0, [1.0, 2.0, 3.0], usage=usage)).tokens_per_s == pytest.approx(0.6)
    assert figures(request(0.0, [1.0, 2.0], usage=None, max_tokens=5)).tokens_per_s == pytest.approx(0.5)
    early = request(0.0, [1.0, 2.0], usage=None, max_tokens=5, finish_reason="stop")
    assert figures(early).tokens_per_s == pytest.approx(0.2)
    assert figures(request(0.0, [1.0, 2.0], end_s=None, max_tokens=5)).tokens_per_s == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("asked", "good", "judged"),
    [
        (request(0.0, [0.9, 1.0]), 1, 1),
        (request(0.0, [1.1, 1.2]), 0, 1),  # first token too late
        (request(0.0, [0.5, 0.7]), 0, 1),  # too long between tokens
        (request(0.0, [0.5]), 1, 1),
        (request(8.0, []), 0, 1),  # still waiting, too late already
        (request(9.5, []), 0, 0),  # still waiting, not yet known
        (request(9.0, [9.5], end_s=None), 0, 0),
        (request(0.0, [5.0], end_s=None), 0, 1),
        (request(0.0, [], end_s=1.0, error="503"), 0, 1),
    ],
)
def test_request_is_good_when_it_meets_the_objective(asked: dict[str, Any], good: int, judged: int) -> None:
    found = figures(asked)
    assert (found.num_good, found.num_judged) == (good, judged)
    assert found.good_share == (good / judged if judged else None)


def test_waiting_is_part_of_the_first_token_of_a_request_that_was_sent_late() -> None:
    found = figures(request(1.0, [2.0], sent_s=1.7))
    assert found.ttft_s == pytest.approx((1.0,))
    assert found.latest_s == pytest.approx(0.7)


def test_hits_are_of_prompt_tokens_and_unknown_where_nobody_tells() -> None:
    assert figures(request(0.0, [1.0])).hit_ratio == pytest.approx(0.4)
    assert figures(request(0.0, [1.0], usage=None)).hit_ratio is None
    assert figures().hit_ratio is None


def test_failures_are_counted_and_their_reasons_kept_once() -> None:
    found = figures(*(request(0.0, [], end_s=1.0, error="503") for _ in range(3)), request(9.0, []))
    assert (found.num_failed, found.num_waiting, found.errors) == (3, 1, ("503",))


def test_objective_needs_times_above_zero() -> None:
    with pytest.raises(ConfigError, match="--slo-itl is 0 ms"):
        Objective(1.0, 0.0)
