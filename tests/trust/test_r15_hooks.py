"""R15: an exception at every per-request hook."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pagemill.llm.async_llm import AsyncLLM
from pagemill.llm.engine_thread import Batch, EngineThread
from tests.fixtures.tiny import tiny_llama
from tests.trust import hooks, planted, server_hooks
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


def test_an_exception_at_any_function_that_works_for_one_request_changes_no_other(
    publish: Callable[[Figure], None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    changed, dropped = planted.count_engine()
    publish(changed)
    publish(dropped)
    assert changed.also["functions"] >= 75
    assert changed.num_trials >= 0.95 * changed.also["functions"]


def test_the_same_holds_with_real_decoding_delivery_and_clients_that_leave(
    tmp_path: Path, publish: Callable[[Figure], None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    changed, dropped = asyncio.run(planted.count_llm(str(tiny_llama(tmp_path))))
    publish(changed)
    publish(dropped)
    assert changed.also["functions"] >= 85
    assert changed.num_trials >= 0.9 * changed.also["functions"]
    for part in ("engine", "cache", "llm", "decoding", "text"):
        assert changed.also[f"in {part}"] > 0


def place_of(run: planted.Run, name: str) -> planted.Place:
    [place] = [each for each in run.calls if each.name == name]
    return place


def test_a_dropped_cache_is_counted(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    life = planted.LIVES[0]
    place = place_of(planted.run_engine(life), "CacheManager.open")
    monkeypatch.setattr(hooks.Engine, "_is_sound_without", lambda self, seq_ids: False)
    run = planted.run_engine(life, place)
    assert (run.reached, run.wrong, run.num_rebuilds) == (True, "", 1)
    [_, dropped] = planted.figures_of("", {place}, [("it", run)])
    assert dropped.num_failures == 1


def test_an_end_that_lets_an_exception_out_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where nobody catches what an abort or a delivery raises."""
    caplog.set_level(logging.CRITICAL)

    def unguarded(self: EngineThread, engine: hooks.Engine, names: Sequence[str], batch: Batch) -> None:
        for name in names:
            batch.deltas += engine.abort(name)

    async def run() -> tuple[planted.Run, planted.Run]:
        stays, leaves = planted.REAL_LIVES[1:3]
        llm = AsyncLLM(str(tiny_llama(tmp_path)), **planted.OPTIONS)
        try:
            await llm.ready()
            whole, _ = await planted.run_llm(llm, stays)
            quiet, _ = await planted.run_llm(llm, leaves)
            monkeypatch.setattr(AsyncLLM, "_break_off", lambda self, stream, error: None)
            monkeypatch.setattr(planted, "SETTLED_S", 0.5)
            undelivered, _ = await planted.run_llm(llm, stays, place_of(whole, "RequestStream.push"))
            undelivered.wrong = undelivered.wrong or planted.lost(undelivered, whole, stays)
            monkeypatch.setattr(EngineThread, "_abort", unguarded)
            aborted, _ = await planted.run_llm(llm, leaves, place_of(quiet, "Engine.abort"))
            return undelivered, aborted
        finally:
            llm.shutdown(10)

    undelivered, aborted = asyncio.run(run())
    assert "failed" in aborted.wrong or "waits for ever" in aborted.wrong
    assert undelivered.reached
    assert "waits for ever" in undelivered.wrong or "was answered" in undelivered.wrong


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
