"""R15: an exception at every per-request hook."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from tests.trust import hooks, server_hooks
from tests.trust.figures import Figure


@pytest.mark.parametrize("hook", hooks.HOOKS, ids=str)
def test_an_exception_for_one_request_changes_no_other(
    hook: hooks.Hook, publish: Callable[[Figure], None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    publish(hooks.count_hook(hook))


@pytest.mark.parametrize("run", [hooks.run_with_decoder, hooks.run_with_failed_row], ids=lambda each: each.__name__)
def test_a_request_that_cannot_be_answered_changes_no_other(
    run: Callable[[], str], publish: Callable[[Figure], None]
) -> None:
    wrong = run()
    publish(hooks.figure_of(1, [wrong] if wrong else []))


def test_an_engine_that_lets_an_exception_out_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = hooks.Engine.step

    def open_handed(self: hooks.Engine) -> object:
        deltas = inner(self)
        for delta in deltas:
            if delta.error is not None:
                raise delta.error
        return deltas

    monkeypatch.setattr(hooks.Engine, "step", open_handed)
    assert "raised what concerns one request" in hooks.run_with(hooks.Hook(hooks.ChoiceText, "push"), 1, hooks.ROOMY)[1]


def test_an_exception_in_a_route_changes_no_other_request(publish: Callable[[Figure], None]) -> None:
    figure = server_hooks.count()
    publish(figure)
    assert figure.num_trials > len(server_hooks.HOOKS)


def test_a_route_that_harms_others_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that answers nobody in one piece any more, once the victim has asked."""
    hits: list[str] = []
    ask, whole = server_hooks._ask, server_hooks.CompletionWriter.whole

    def asking(client: object, route: str, who: str, **options: bool) -> tuple[int, str]:
        hits.extend([who] if who == server_hooks.VICTIM else [])
        return ask(client, route, who, **options)  # type: ignore[arg-type]

    def harming(self: server_hooks.CompletionWriter) -> object:
        if hits and self._body.cache_salt != server_hooks.VICTIM:
            raise server_hooks.PlantedError("harm")
        return whole(self)

    monkeypatch.setattr(server_hooks, "_ask", asking)
    monkeypatch.setattr(server_hooks.CompletionWriter, "whole", harming)
    with server_hooks.served() as live:
        hook = server_hooks.Hook("chat", server_hooks.chat, "cache_of")
        assert "others were changed" in server_hooks.run_with(live, hook, stream=False)[1]
