"""S11: what goes beyond a limit is refused before any work of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import httpx
import pytest

from tests.trust import beyond
from tests.trust.figures import Figure


def test_every_limit_refuses_before_any_work(publish: Callable[[Figure], None]) -> None:
    figure = beyond.count()
    publish(figure)
    assert figure.also["limits"] >= 30


@pytest.fixture(scope="module")
def made() -> Iterator[beyond.Bench]:
    with beyond.bench() as bench:
        yield bench


@pytest.mark.parametrize(
    ("body", "told"),
    [({}, "answered with 200"), ({"prompt": 5}, "something else"), ({"n": 129}, "something else")],
)
def test_a_request_that_is_let_in_or_refused_for_something_else_is_seen(
    made: beyond.Bench, body: dict[str, object], told: str
) -> None:
    whole = {"prompt": "hi", "max_tokens": 1} | body
    case = beyond.Case("max_depth", "nested", lambda bench: bench.post(beyond.COMPLETIONS, whole))
    assert told in beyond.wrong_with(made, case)[0]


def test_work_of_the_tokeniser_is_seen(made: beyond.Bench) -> None:
    case = beyond.Case("max_prompt_tokens", "", lambda bench: bench.post(beyond.COMPLETIONS, {"prompt": "7#q" * 2000}))
    assert "tokeniser was asked" in beyond.wrong_with(made, case)[0]


@pytest.mark.parametrize("status", [400, 500, 200])
def test_a_refusal_with_another_status_is_seen(made: beyond.Bench, status: int) -> None:
    case = beyond.Case("header_timeout_s", "", lambda _: httpx.Response(status), status=408)
    assert f"answered with {status}" in beyond.wrong_with(made, case)[0]


def test_a_client_that_is_not_cut_is_seen() -> None:
    with beyond.bench(replace(beyond.LIMITS, write_timeout_s=1e6)) as made:
        assert "was not cut" in beyond.reads_nothing(made, patience_s=3.0)


def test_a_late_refusal_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(made: beyond.Bench) -> httpx.Response:
        made.began_s = beyond.time.perf_counter() - 0.7
        return httpx.Response(400)

    late = [
        beyond.Case("a", "", slow),
        beyond.Case("b", "", slow, timer_s=0.7),
        beyond.Case("c", "", slow, timer_s=None),
    ]
    monkeypatch.setattr(beyond, "cases", lambda: iter(late))
    figure = beyond.soon(1)
    assert (figure.num_failures, figure.num_trials) == (1, 2)
    assert figure.replays[0].startswith("a (0): 70")
