"""R7: the cache is invisible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pagemill.cache.windows import WindowGroup
from pagemill.kernels.pages import Pages
from tests.fixtures.default_model import default_model_path
from tests.fixtures.tiny import tiny_llama
from tests.trust import conversations
from tests.trust.figures import Figure


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("tiny")))


@pytest.mark.parametrize("seed", [0, 1, 2, 4, 10, 13])
def test_conversations_on_a_tiny_model_are_the_same_with_the_cache_in_any_state(
    tiny: str, seed: int, publish: Callable[[Figure], None]
) -> None:
    figure = conversations.count_tiny(tiny, seed)
    publish(figure)
    assert min(figure.also.values()) > 0, "an arm met nothing of what it is for"
    assert figure.num_trials == 100 * figure.also["arms"]
    assert ("pages of windows that left" in figure.also) == (conversations.family_of(seed) in ("mistral", "qwen2"))


@pytest.mark.model
def test_conversations_on_the_default_model_are_the_same_with_the_cache_in_any_state(
    publish: Callable[[Figure], None],
) -> None:
    figure = conversations.count_default(str(default_model_path()), 0)
    publish(figure)
    assert figure.num_trials == 20 * figure.also["arms"]


def test_a_copy_that_loses_a_position_is_noticed(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Pages.copy

    def short(self: Pages, moved: Any) -> None:
        if moved.num_positions > 1:
            copy(self, type(moved)(moved.source, moved.target, moved.num_positions - 1))

    monkeypatch.setattr(Pages, "copy", short)
    figure = conversations.count_tiny(tiny, 1)
    assert figure.num_failures > 0
    assert figure.replays


def test_seeds_of_the_release_meet_every_family_in_several_codecs() -> None:
    seeds = [seed for seed in range(24) if seed % 5 != 4]  # scripts/trust.py: the rest are of the default model
    met = {(conversations.family_of(seed), seed % 4) for seed in seeds}
    assert all(sum(family == each for family, _ in met) >= 3 for each in conversations.FAMILIES)


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_a_copy_in_a_window_that_loses_a_position_is_noticed(
    tiny: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = WindowGroup.copy

    def short(self: WindowGroup, source: int, target: int, num_positions: int) -> None:
        copy(self, source, target, max(num_positions - 1, 1))

    monkeypatch.setattr(WindowGroup, "copy", short)
    figure = conversations.count_tiny(tiny, 4 * conversations.FAMILIES.index(family))
    assert figure.num_failures > 0
