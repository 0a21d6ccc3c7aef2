"""R13: SIGTERM with requests under way."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.fixtures.tiny import tiny_llama
from tests.trust import draining
from tests.trust.figures import Figure
from tests.trust.serving import FORMS, Reply


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("tiny"), context=1536))


def test_a_drain_loses_nothing_that_is_under_way_and_takes_nothing_new(
    tiny: str, publish: Callable[[Figure], None]
) -> None:
    under_way, new = draining.count(tiny, range(2))
    publish(under_way)
    publish(new)
    assert min(under_way.also[name] for name in ("ran", "waited", "new ones refused with 503")) > 0, under_way


ASKED = draining.Asked("text", True, 2, 5)
USAGE: dict[str, Any] = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 10}}


def _part(index: int, reason: str | None = None, num_told: int = 0) -> dict[str, Any]:
    choice = {"index": index, "finish_reason": reason, "logprobs": {"tokens": ["a"] * num_told}}
    return {"choices": [choice]}


def _stream(*events: dict[str, Any], done: bool = True) -> Reply:
    lines = [f"data: {json.dumps(each)}\n\n" for each in events] + ["data: [DONE]\n\n"] * done
    return Reply(200, {}, "".join(lines).encode(), is_whole=True)


def _at_once(*events: dict[str, Any]) -> Reply:
    """The same answer without a stream."""
    choices = [each for event in events for each in event["choices"]]
    return Reply(200, {}, json.dumps({**USAGE, "choices": choices}).encode(), is_whole=True)


def _with_tokens(count: int) -> dict[str, Any]:
    return {**USAGE, "usage": {**USAGE["usage"], "completion_tokens": count}}


ENDS = (_part(0, "length"), _part(1, "length"))
WHOLE = _stream(_part(0), *ENDS, USAGE)
BROKEN = {
    "cut off": replace(WHOLE, body=WHOLE.body[:-20], is_whole=False),
    "refused": Reply(503, {}, b"{}", is_whole=True),
    "no connection": Reply(0),
    "without its end": _stream(_part(0), *ENDS, USAGE, done=False),
    "failed": _stream({"error": {}}),
    "a choice without its end": _stream(_part(0), ENDS[1], USAGE),
    "a choice that ends twice": _stream(ENDS[0], *ENDS, USAGE),
    "a choice that never came": _stream(ENDS[0], USAGE),
    "a choice too many": _stream(*ENDS, _part(2, "length"), USAGE),
    "an early end": _stream(ENDS[0], _part(1, "stop"), _with_tokens(9)),
    "an early end at its length": _stream(*ENDS, _with_tokens(7)),
    "no figures": _stream(*ENDS),
}
BROKEN_AT_ONCE = {
    "a choice that never came": _at_once(ENDS[1]),
    "no choice": _at_once(),
    "an early end": _at_once(ENDS[0], _part(1, "stop")),
    "a choice without its end": _at_once(ENDS[0], _part(1)),
    "an early end at its length": Reply(200, {}, _at_once(*ENDS).body.replace(b": 10", b": 6"), is_whole=True),
}


def _num_lost(asked: draining.Asked, *replies: Reply) -> int:
    result = draining.Drain()
    for each in replies:
        result.saw(asked, each)
    assert result.num_under_way == len(replies)
    return len(result.lost)


@pytest.mark.parametrize("name", BROKEN)
def test_a_stream_that_is_not_whole_is_counted(name: str) -> None:
    assert _num_lost(ASKED, BROKEN[name], WHOLE) == 1


@pytest.mark.parametrize("name", BROKEN_AT_ONCE)
def test_an_answer_that_is_not_whole_is_counted(name: str) -> None:
    assert _num_lost(replace(ASKED, stream=False), BROKEN_AT_ONCE[name], _at_once(*ENDS)) == 1


def test_tokens_that_were_made_and_not_told_are_counted() -> None:
    asked = replace(ASKED, has_logprobs=True)
    parts = (_part(0, None, 4), _part(0, "length", 1), _part(1, "length", 5))
    assert _num_lost(asked, _stream(*parts, USAGE)) == 0
    assert _num_lost(asked, _stream(*parts[1:], USAGE)) == 1


def test_what_is_asked_counts_each_prompt_as_often_as_it_is_answered() -> None:
    found = {asked.form: asked.num_choices for seed in range(3) for asked, _ in draining.draw_requests(seed)}
    assert found.keys() == FORMS.keys()
    assert (found["text"], found["several"], found["batch"], found["ids"], found["chat"]) == (1, 3, 2, 4, 1)


def test_a_new_request_that_is_taken_or_refused_without_a_time_is_counted() -> None:
    result = draining.Drain()
    result.refused("new", WHOLE)
    result.refused("new", Reply(503, {}, b"{}", is_whole=True))
    result.refused("new", Reply(0))
    body = b'{"error": {"type": "overloaded_error", "message": "later"}}'
    result.refused("new", Reply(503, {"retry-after": "5"}, body, is_whole=True))
    assert len(result.taken) == 2
