"""What the engine needs from outside, as protocols. The product injects the real ones, tests their fakes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pagemill.base.clock import Clock
from pagemill.base.step import Executor

__all__ = ["Clock", "Decode", "Executor"]


class Decode(Protocol):
    """Turns token ids into text; invalid or unfinished UTF-8 shows as U+FFFD."""

    def __call__(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str: ...
