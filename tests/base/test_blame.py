"""Whom the calls that led to an error were made for, and what that one is told."""

from __future__ import annotations

import logging

import pytest

from pagemill.base.blame import blamed, failure_of, reason_of
from pagemill.base.errors import RequestError


def inner(number: int, *, text: str) -> None:
    raise RuntimeError(f"{number} {text}")


def outer(number: int) -> None:
    inner(-1, text="of the inner call")
    raise AssertionError(number)


def caught() -> RuntimeError:
    try:
        outer(5)
    except RuntimeError as error:
        return error
    raise AssertionError


def test_the_innermost_call_with_something_of_one_is_asked_first() -> None:
    assert blamed(caught(), lambda name, value: value if name == "number" else None) == -1
    assert blamed(caught(), lambda name, value: value if name == "text" else None) == "of the inner call"
    assert blamed(caught(), lambda _, value: value if isinstance(value, int) and value > 0 else None) == 5
    assert blamed(caught(), lambda *_: None) is None


def test_what_a_call_takes_as_any_arguments_counts_too() -> None:
    def wrapped(first: int, *more: object) -> None:
        raise RuntimeError(first, *more)

    with pytest.raises(RuntimeError) as raised:
        wrapped(1, "of the second", 3)
    assert blamed(raised.value, lambda _, value: value if isinstance(value, str) else None) == "of the second"
    assert blamed(raised.value, lambda name, value: (name, value) if value == 3 else None) == ("more", 3)
    assert blamed(raised.value, lambda name, value: value if name == "first" else None) == 1


def test_an_error_of_ours_is_told_and_any_other_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("pagemill.test")
    assert reason_of(RequestError("too long; send less"), log) == "too long; send less"
    assert not caplog.records
    assert "number of a card" not in reason_of(RuntimeError("number of a card"), log)
    assert caplog.records[0].exc_info is not None


def test_a_failure_carries_the_parameter_that_its_error_names() -> None:
    log = logging.getLogger("test")
    wrong = failure_of(3, RequestError("cannot go on", param="grammar"), log)
    assert (wrong.seq_id, wrong.reason, wrong.param) == (3, "cannot go on", "grammar")
    assert failure_of(3, RuntimeError("x"), log).param is None
    stranger = RuntimeError("of a library")
    stranger.param = "p"  # type: ignore[attr-defined]
    assert failure_of(3, stranger, log).param is None
