"""What the engine needs from outside, as protocols. The product injects the real ones, tests their fakes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pagemill.base.clock import Clock
from pagemill.base.step import Executor
from pagemill.cache.entry import Removed, Stored

__all__ = ["CacheEvent", "CacheListener", "Clock", "Decode", "Executor"]

CacheEvent = Stored | Removed


class CacheListener(Protocol):
    """Is told of each block that can be found from now on or no longer, in order; must not raise nor use the engine."""

    def __call__(self, event: CacheEvent) -> None: ...


class Decode(Protocol):
    """Turns token ids into text; invalid or unfinished UTF-8 shows as U+FFFD."""

    def __call__(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str: ...
