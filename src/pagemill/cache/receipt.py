"""What a look-up found and why not more: the cache's part of a receipt. Owns the reasons and the memory behind them."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

Reason = Literal["not seen", "evicted", "differs", "other format", "window not kept", "tier failed", "bypassed"]

SENTENCES: dict[str, str] = {
    "not seen": "not seen recently",
    "differs": "differs at token {position}",
    "other format": "same text under another adapter, format or numerics",
    "window not kept": "window not kept",
    "tier failed": "a tier failed",
    "bypassed": "the request goes past the cache",
}


@dataclass(frozen=True, slots=True)
class Miss:
    """Why the first position that was not found was not. evicted_s: seconds since, by `policy`."""

    reason: Reason
    position: int
    evicted_s: float | None = None
    policy: str | None = None

    def __str__(self) -> str:
        if self.reason == "evicted":
            return f"evicted {self.evicted_s:.1f} s ago by {self.policy}"
        return SENTENCES[self.reason].format(position=self.position)


@dataclass(frozen=True, slots=True)
class Lookup:
    """What `open` found. num_asked: tokens looked for. num_hit: those that need not be computed, by tier: only the hot
    one is here (num_hot). miss: None where all that could be hit was."""

    num_asked: int
    num_hit: int = 0
    num_hot: int = 0
    miss: Miss | None = None


class RecentKeys:
    """Keys that something happened to lately, with time. Mutated by `add`, `forget`, `resize` and `clear`. Bounded by
    `capacity`: the oldest go first."""

    __slots__ = ("_keys", "capacity")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._keys: OrderedDict[bytes, float] = OrderedDict()

    def add(self, key: bytes, now_s: float) -> None:
        """It has happened to a key."""
        self._keys[key] = now_s
        self._keys.move_to_end(key)
        if len(self._keys) > self.capacity:
            self._keys.popitem(last=False)

    def when(self, key: bytes) -> float | None:
        """When it did, None where it did not or is forgotten."""
        return self._keys.get(key)

    def forget(self, key: bytes) -> None:
        """Drop a key, as after a purge."""
        self._keys.pop(key, None)

    def resize(self, capacity: int) -> None:
        """Remember so many at the most from now on."""
        self.capacity = capacity
        while len(self._keys) > capacity:
            self._keys.popitem(last=False)

    def clear(self) -> None:
        """Forget everything."""
        self._keys.clear()

    def __len__(self) -> int:
        return len(self._keys)
