"""One clock, injected wherever time is read, so that tests run on a virtual one."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Anything that tells a monotonic time in seconds."""

    def now(self) -> float:
        """Seconds since an arbitrary fixed moment; never goes back."""
        ...


class MonotonicClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        return time.monotonic()


class VirtualClock:
    """A clock that moves only when told to. Mutated by `advance`."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Move forward by `seconds` (≥ 0)."""
        assert seconds >= 0, "a monotonic clock never goes back"
        self._now_s += seconds
