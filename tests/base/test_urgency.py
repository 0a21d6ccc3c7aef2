"""Priority and deadline of a request, what serving adds to a configuration, and the errors of a queue."""

from __future__ import annotations

import pytest

from pagemill.base.config import EngineConfig, for_serving, resolve_config
from pagemill.base.errors import CapacityError, ConfigError, DeadlineError, QueueFullError, RequestError
from pagemill.base.params import SamplingParams


def test_priority_and_deadline_are_unset_by_default_and_take_numbers_of_any_kind() -> None:
    assert (SamplingParams().priority, SamplingParams().deadline_s) == (0, None)
    params = SamplingParams(priority=-100, deadline_s=3)
    assert (params.priority, params.deadline_s) == (-100, 3.0)


@pytest.mark.parametrize("priority", [101, -101, 1.5, "high", None, True])
def test_a_priority_out_of_range_or_of_another_type_is_refused(priority: object) -> None:
    with pytest.raises(RequestError, match="priority is"):
        SamplingParams(priority=priority)  # type: ignore[arg-type]


@pytest.mark.parametrize("deadline_s", [0, -1, 1e9, float("nan"), float("inf"), "soon", True])
def test_a_deadline_out_of_range_or_of_another_type_is_refused(deadline_s: object) -> None:
    with pytest.raises(RequestError, match="deadline_s is"):
        SamplingParams(deadline_s=deadline_s)  # type: ignore[arg-type]


def test_serving_bounds_waiting_unless_told_otherwise() -> None:
    served = for_serving(EngineConfig())
    assert (served.mixed_step_percent, served.max_queued_requests) == (180, 1024)
    own = EngineConfig(mixed_step_percent=300, max_queued_requests=7)
    assert for_serving(own) == own
    assert (EngineConfig().mixed_step_percent, EngineConfig().max_queued_requests) == (None, None)


def test_a_target_between_tokens_takes_the_place_of_the_bound_in_percent() -> None:
    given = resolve_config({}, environ={"PAGEMILL_TARGET_ITL_MS": "25"}).config
    assert given.target_itl_ms == 25
    served = for_serving(given)
    assert (served.target_itl_ms, served.mixed_step_percent, served.max_queued_requests) == (25, None, 1024)


@pytest.mark.parametrize("value", [0, -5, 100_001, "soon", "2.5", True])
def test_a_target_between_tokens_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="target_itl_ms"):
        resolve_config({"target_itl_ms": value}, environ={})


@pytest.mark.parametrize(
    ("other", "why"),
    [({"mixed_step_percent": 150}, "both say how long a step"), ({"kv_cache": "none"}, "cannot be cut to fit")],
)
def test_a_target_between_tokens_beside_what_contradicts_it_is_refused(other: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        resolve_config({"target_itl_ms": 25, **other}, environ={})


@pytest.mark.parametrize(
    "options", [{"mixed_step_percent": 100}, {"mixed_step_percent": "fast"}, {"max_queued_requests": 0}]
)
def test_bounds_that_are_none_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        resolve_config(options, environ={})


def test_errors_of_waiting_carry_what_a_server_answers_with() -> None:
    full = QueueFullError("full", retry_after_s=2.0, status=429)
    assert isinstance(full, CapacityError)
    assert (full.retry_after_s, full.status, full.exit_code) == (2.0, 429, 2)
    late = DeadlineError("late")
    assert isinstance(late, RequestError)
    assert late.status == 504
