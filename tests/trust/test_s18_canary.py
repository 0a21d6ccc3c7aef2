"""S18: a canary prompt in logs, traces, metrics and crash text."""

from __future__ import annotations

import base64
from collections.abc import Callable

import pytest

from tests.fixtures.tiny import tiny_llama
from tests.trust import canary
from tests.trust.figures import Figure


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("tiny"), context=1536))


@pytest.mark.parametrize("setting", [("warning", "text"), ("info", "json")], ids="-".join)
def test_what_clients_write_is_told_nowhere(
    tiny: str, setting: tuple[str, str], publish: Callable[[Figure], None]
) -> None:
    publish(canary.count(tiny, [setting]))


def test_at_level_debug_the_search_finds_the_words_of_errors(tiny: str) -> None:
    places, _ = canary.told(tiny, "debug", "text")
    found = canary.found_in(places)
    assert [each for each in found if each.startswith(f"{canary.ERRORS}, as text")], found


@pytest.mark.parametrize("begin", ["", "a", "ab"])
def test_every_encoding_is_found(begin: str) -> None:
    text = f"{begin}{canary.canary('prompt')} and more"
    shown = [text, text.encode().hex(), base64.b64encode(text.encode()).decode(), str(list(text.encode()))]
    for each in shown:
        assert len(canary.found_in({"log": each.encode()})) == 1, each
    assert canary.found_in({"log": b"nothing of the kind"}) == []
