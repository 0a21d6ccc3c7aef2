"""S5: what one tenant is told does not depend on what another one writes."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from pagemill.engine.engine import Engine
from pagemill.engine.output import Delta
from tests.contracts.cache import broken
from tests.trust import leaks, server_leaks
from tests.trust.figures import Figure

PAIRS = 30


@pytest.mark.parametrize("part", range(2))
def test_an_observer_sees_the_same_whatever_another_tenant_writes(part: int, publish: Callable[[Figure], None]) -> None:
    figure = leaks.count(range(part * PAIRS, (part + 1) * PAIRS))
    publish(figure)
    controls = figure.also["controls that differ (same tenant)"]
    assert controls > 0.9 * figure.num_trials, "an observer that sees nothing proves nothing"


def test_a_cache_that_shares_across_tenants_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    broken.shares_across_tenants(monkeypatch)
    figure = leaks.count(range(2))
    assert figure.num_failures
    assert "--replay S5:" in figure.replays[0]


@pytest.mark.parametrize("told", ["num_cached_tokens", "line"])
def test_an_engine_that_tells_how_much_others_ask_is_seen(monkeypatch: pytest.MonkeyPatch, told: str) -> None:
    """It tells everybody how many requests came, in numbers and in errors."""
    add, step, num_asked = Engine.add_request, Engine.step, Counter[Engine]()

    def counting(self: Engine, *arguments: Any, **named: Any) -> Any:
        num_asked[self] += 1
        return add(self, *arguments, **named)

    def telling(self: Engine) -> list[Delta]:
        if told == "line":
            return [each._replace(stop_reason=f"{num_asked[self]} were asked") for each in step(self)]
        return [each._replace(num_cached_tokens=each.num_cached_tokens + num_asked[self]) for each in step(self)]

    monkeypatch.setattr(Engine, "add_request", counting)
    monkeypatch.setattr(Engine, "step", telling)
    assert leaks.volume_leak(0)
    assert leaks.count(range(1)).num_failures == 1


TOLD: dict[str, Any] = {"id": "cmpl-0123456789abcdef01234567", "created": 1700000000, "usage": {"prompt_tokens": 3}}
HEADERS = {
    "x-request-id": "req-fedcba9876543210fedcba98",
    "content-length": "20",
    "date": "Tue, 14 Nov 2023 22:13:21 GMT",
}


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({}, {"id": "cmpl-41"}),
        ({}, {"id": "cmpl-canary-tenant-7f3a01234567"}),
        ({"x-request-id": "41"}, {}),
        ({"content-length": "21"}, {}),
        ({"date": "Tue, 14 Nov 2023 22:13:41 GMT"}, {}),
        ({}, {"created": 41}),
        ({}, {"choices": [{"id": "41"}]}),
        ({}, {"queue_ms": "41 requests"}),
    ],
)
def test_an_id_or_a_time_that_may_tell_something_is_seen(headers: dict[str, str], body: dict[str, Any]) -> None:
    span = (1_700_000_000.0, 1_700_000_002.0)
    assert server_leaks.odd_ids(HEADERS, TOLD, 20, span) == []
    assert server_leaks.odd_ids(HEADERS | headers, TOLD | body, 20, span)


def test_ids_that_count_or_begin_alike_are_seen() -> None:
    counted = [f"cmpl-{number:024x}" for number in (3, 900)]
    alike = [f"req-0123456789{secrets.token_hex(7)}" for _ in range(2)]
    assert server_leaks.alike([f"cmpl-{secrets.token_hex(12)}" for _ in range(100)]) == []
    assert server_leaks.alike(counted)
    assert server_leaks.alike(alike)
    assert server_leaks.alike([counted[0]] * 2)


# In a server's process: everybody is told how many requests came, of whomever.
TELLING = """
from pagemill.server.access_door import Door
from pagemill.server.usage import Tally
let_in, cached, num_asked = Door._let_in, Tally.num_cached_tokens.fget, []

def counting(self, *arguments):
    num_asked.append(1)
    return let_in(self, *arguments)

Door._let_in = counting
Tally.num_cached_tokens = property(lambda self: cached(self) + len(num_asked))
"""


def test_a_server_that_tells_how_much_others_ask_is_seen() -> None:
    assert "cached_tokens" in server_leaks.volume_leak(0, TELLING)


def test_an_observer_is_told_the_same_over_http_whatever_another_tenant_asks(publish: Callable[[Figure], None]) -> None:
    figure = server_leaks.count(range(1))
    publish(figure)
    assert figure.also["controls that differ (same key)"] == figure.num_trials
    assert figure.also["things told over HTTP"] > 15
