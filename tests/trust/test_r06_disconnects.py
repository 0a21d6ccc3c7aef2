"""R6: clients that leave, in every state."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from pagemill.llm.async_llm import AsyncLLM
from pagemill.llm.engine_thread import Abort, Command
from pagemill.server import events
from tests.fixtures.tiny import tiny_llama
from tests.trust import disconnects
from tests.trust.figures import Figure


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("tiny"), context=1536))


def test_clients_that_leave_hold_no_block_a_step_later_and_leave_nothing(
    tiny: str, publish: Callable[[Figure], None]
) -> None:
    left, beside = disconnects.count(tiny, disconnects.every_trial())
    publish(left)
    publish(beside)
    assert all(count >= 6 for count in left.also.values()), f"a state was hardly met: {left}"


async def watch_nothing(receive: object, stream: object) -> None:
    await asyncio.Event().wait()


def leave_nothing(self: AsyncLLM, request_ids: Sequence[str]) -> None:
    return


@pytest.mark.parametrize(
    ("owner", "name", "broken"), [(events, "_watch", watch_nothing), (AsyncLLM, "_leave", leave_nothing)]
)
@pytest.mark.parametrize("stream", [True, False])
def test_a_server_that_goes_on_without_its_client_is_counted(
    tiny: str, owner: Any, name: str, broken: Any, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, broken)
    monkeypatch.setattr(disconnects, "WAIT_S", 0.5)
    trials = [disconnects.Trial(0, "decode", "text", stream, resets=False)]
    assert disconnects.count(tiny, trials)[0].num_failures >= 1


def test_a_request_that_is_not_ended_at_once_is_counted(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine takes the word of its leaving some steps late."""
    send = disconnects.Watched._watched_send

    def late(self: disconnects.Watched, command: Command) -> None:
        held = self._send
        if isinstance(command, Abort):
            self._send = lambda each: asyncio.get_running_loop().call_later(0.2, held, each)  # type: ignore[assignment]
        send(self, command)
        self._send = held

    monkeypatch.setattr(disconnects.Watched, "_watched_send", late)
    trials = [disconnects.Trial(0, "decode", "text", True, resets=False)]
    [wrong] = disconnects.count(tiny, trials)[0].replays
    assert "steps later" in wrong


def test_one_that_was_preempted_and_goes_on_without_its_client_is_counted(
    tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AsyncLLM, "_leave", leave_nothing)
    monkeypatch.setattr(disconnects, "WAIT_S", 2.0)
    figure = disconnects.count(tiny, [disconnects.Trial(0, "preempted", "ids", True, resets=False)])[0]
    assert figure.also["left at preempted"] == 1
    assert "its leaving was not seen" in figure.replays[0]


def test_late_ones_are_judged_where_times_are(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disconnects, "LATE_S", 0.0)
    trials = [disconnects.Trial(number, "decode", "text", True, resets=False) for number in range(3)]
    assert disconnects.count(tiny, trials)[0].num_failures == 0
    [wrong] = disconnects.count(tiny, trials, timed=True)[0].replays
    assert "3 of 3 were freed" in wrong
