"""Random operations on a cache with window groups, and broken groups that must be caught."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from pagemill.cache.windows import WindowGroup, Windows
from tests.contracts.cache.exercise import exercise
from tests.contracts.cache.slow_index import ViolationError
from tests.contracts.cache.windowed import WindowedHarness
from tests.fixtures.policy_makers import EVERY_POLICY


def run(seed: int, policy: str = "lru") -> WindowedHarness:
    harness = WindowedHarness(num_blocks=(6, 12, 30)[seed % 3], num_pages=(9, 14)[seed % 2], policy=policy)
    exercise(harness, seed, 150)
    return harness


def run_all(seeds: range) -> None:
    for seed in seeds:
        run(seed)


@pytest.mark.parametrize("policy", EVERY_POLICY)
def test_random_operations_read_nothing_stale_in_a_window(policy: str) -> None:
    found = [run(seed, policy) for seed in range(6)]
    assert sum(each.num_hit for each in found) > 50
    assert sum(each.num_operations for each in found) > 600


def short_copy(patch: pytest.MonkeyPatch) -> None:
    copy = WindowGroup.copy
    patch.setattr(WindowGroup, "copy", lambda self, source, target, count: copy(self, source, target, count - 1))


def lets_go_too_early(patch: pytest.MonkeyPatch) -> None:
    def broken(self: WindowGroup, position: int) -> int:
        return max(position - self.window + 1 + self._size, 0) // self._size

    patch.setattr(WindowGroup, "first_read", broken)


def keeps_what_was_dropped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(WindowGroup, "drop", lambda self, block: None)


def hits_what_windows_let_go_of(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Windows, "longest", lambda self, blocks, num_tokens: num_tokens)


def holds_for_ever(patch: pytest.MonkeyPatch) -> None:
    def broken(self: WindowGroup, blocks: Iterable[int]) -> None:
        leave(self, list(blocks)[1:])

    leave = WindowGroup.leave
    patch.setattr(WindowGroup, "leave", broken)


def wipes_nothing(patch: pytest.MonkeyPatch) -> None:
    moves = WindowGroup.moves
    patch.setattr(WindowGroup, "moves", lambda self: type(moves(self))((), moves(self).copies))


BROKEN = [
    short_copy, lets_go_too_early, keeps_what_was_dropped, hits_what_windows_let_go_of, holds_for_ever, wipes_nothing,
]  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN, ids=lambda each: each.__name__)
def test_a_broken_window_is_caught(
    broken: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the harness, or by the product's own assertions."""
    broken(monkeypatch)
    with pytest.raises((ViolationError, AssertionError, LookupError)):
        run_all(range(40))
