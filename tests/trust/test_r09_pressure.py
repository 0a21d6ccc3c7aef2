"""R9: far more is asked than the server holds."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator

import pytest
from fastapi import Response

from pagemill.server import limits_body
from tests.fixtures.live_server import LiveServer
from tests.fixtures.tiny import tiny_llama
from tests.trust import pressure
from tests.trust.figures import Figure
from tests.trust.serving import Reply


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("tiny"), context=1536))


def test_a_flood_is_answered_or_refused_cleanly_and_leaves_a_server_that_works(
    tiny: str, publish: Callable[[Figure], None]
) -> None:
    [figure] = pressure.count(tiny, range(300))
    publish(figure)
    assert figure.also["answered"] > 100
    assert figure.also["refused with 503 and Retry-After"] > 100


def test_where_memory_runs_out_requests_are_refused_cleanly(tiny: str, publish: Callable[[Figure], None]) -> None:
    figure = pressure.count_exhausted(tiny, 60)
    publish(figure)
    assert (
        min(figure.also[name] for name in ("answered", "refused with 503 and Retry-After", "refused in a stream")) > 0
    )


@pytest.fixture(scope="module")
def server(tiny: str) -> Iterator[LiveServer]:
    with pressure.guarded_server(tiny) as live:
        yield live


@pytest.mark.parametrize(("owner", "name"), pressure.EXHAUSTED, ids=[name for _, name in pressure.EXHAUSTED])
def test_where_memory_runs_out_once_on_a_requests_way_it_is_refused_cleanly(
    owner: object, name: str, server: LiveServer, publish: Callable[[Figure], None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    publish(pressure.count_exhausted_at(server, owner, name))


def test_an_answer_without_retry_after_is_noticed(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a body's checks let out what they meet."""
    monkeypatch.setattr(limits_body, "error_response", lambda error: Response(b"{}", 500))
    figure = pressure.count_exhausted_at(server, limits_body, "check_request")
    assert (figure.num_failures, "status 500" in figure.replays[0]) == (1, True)


def reply(status: int, body: object, **headers: str) -> Reply:
    return Reply(status, {"content-type": "application/json", **headers}, json.dumps(body).encode(), is_whole=True)


REFUSAL = {"error": {"type": "overloaded_error", "message": "later"}}
UNCLEAN = {
    "no connection": Reply(0),
    "no time to come again": reply(503, REFUSAL),
    "no message": reply(503, {"error": {"type": "overloaded_error", "message": ""}}, **{"retry-after": "1"}),
    "another kind": reply(503, {"error": {"type": "server_error", "message": "x"}}, **{"retry-after": "1"}),
    "a mistake of ours": reply(500, REFUSAL, **{"retry-after": "1"}),
    "another answer": reply(200, {"choices": [{"text": "no"}]}),
    "cut off": Reply(200, {"content-type": "application/json"}, b"{", is_whole=False),
}


@pytest.mark.parametrize("name", UNCLEAN)
def test_what_is_not_clean_is_counted(name: str) -> None:
    flood = pressure.Flood()
    flood.saw("known", UNCLEAN[name], "yes")
    flood.saw("known", reply(503, REFUSAL, **{"retry-after": "1"}), "yes")
    flood.saw("known", reply(200, {"choices": [{"text": "yes"}]}), "yes")
    assert (len(flood.wrong), flood.num_asked) == (1, 3)
