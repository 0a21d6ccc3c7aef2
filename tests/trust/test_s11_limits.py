"""S11: what goes beyond a limit is refused before any work of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

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
