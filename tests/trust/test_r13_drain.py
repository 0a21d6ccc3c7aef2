"""R13: SIGTERM with requests under way."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.fixtures.tiny import tiny_llama
from tests.trust import draining
from tests.trust.figures import Figure
from tests.trust.serving import Reply


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


def _event(**fields: object) -> bytes:
    return (
        b'data: {"choices": [%s]}\n\n'
        % ", ".join(f'"{key}": {value}' for key, value in fields.items()).join("{}").encode()
    )


WHOLE = _event(index=0, finish_reason="null") + _event(index=0, finish_reason='"length"') + b"data: [DONE]\n\n"
BROKEN = {
    "cut off": Reply(200, {}, WHOLE[:-20], is_whole=False),
    "refused": Reply(503, {}, b"{}", is_whole=True),
    "no connection": Reply(0),
    "failed": Reply(200, {}, b'data: {"error": {}}\n\ndata: [DONE]\n\n', is_whole=True),
    "a choice without its end": Reply(200, {}, _event(index=1, finish_reason="null") + WHOLE, is_whole=True),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_answer_that_is_not_whole_is_counted(name: str) -> None:
    result = draining.Drain()
    result.saw("text", True, BROKEN[name])
    result.saw("text", True, Reply(200, {}, WHOLE, is_whole=True))
    assert (len(result.lost), result.num_under_way) == (1, 2)


def test_a_new_request_that_is_taken_or_refused_without_a_time_is_counted() -> None:
    result = draining.Drain()
    result.refused("new", Reply(200, {}, WHOLE, is_whole=True))
    result.refused("new", Reply(503, {}, b"{}", is_whole=True))
    result.refused("new", Reply(0))
    body = b'{"error": {"type": "overloaded_error", "message": "later"}}'
    result.refused("new", Reply(503, {"retry-after": "5"}, body, is_whole=True))
    assert len(result.taken) == 2
