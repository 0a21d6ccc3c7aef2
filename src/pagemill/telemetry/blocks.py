"""How long blocks live, lie idle and wait for their next use, on a sample of them. Owns the moments of that sample.

Told by the cache's events, on the engine's thread; a block is in the sample if its content key is, which is chance. No
more blocks are followed than are published.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from pagemill.telemetry.metrics import Metrics

SAMPLED_OF_256: Final = 32  # first bytes of keys that are in the sample: an eighth of the blocks


class BlockLives:
    """Moments of sampled blocks. Mutated by `stored`, `used` and `removed`; times in seconds on one clock."""

    __slots__ = ("_idle", "_life", "_moments", "_reuse")

    def __init__(self, metrics: Metrics) -> None:
        self._life = metrics["vllm:kv_block_lifetime_seconds"]
        self._idle = metrics["vllm:kv_block_idle_before_evict_seconds"]
        self._reuse = metrics["vllm:kv_block_reuse_gap_seconds"]
        self._moments: dict[bytes, tuple[float, float]] = {}  # stored, last used

    @property
    def num_followed(self) -> int:
        """Blocks in the sample now."""
        return len(self._moments)

    def stored(self, key: bytes, now_s: float) -> None:
        """A block can be found from now on."""
        if key[0] < SAMPLED_OF_256:
            self._moments[key] = (now_s, now_s)

    def used(self, keys: Iterable[bytes], now_s: float) -> None:
        """Blocks were found by a look-up."""
        gaps = []
        for key in keys:
            if key[0] < SAMPLED_OF_256 and (moments := self._moments.get(key)) is not None:
                gaps.append(now_s - moments[1])
                self._moments[key] = (moments[0], now_s)
        if gaps:
            self._reuse.observe(gaps)

    def removed(self, key: bytes, evicted: bool, now_s: float) -> None:
        """A block can no longer be found. evicted: for want of room; a purge says nothing of how long blocks last."""
        if key[0] >= SAMPLED_OF_256:
            return
        moments = self._moments.pop(key, None)
        if moments is not None and evicted:
            self._life.observe((now_s - moments[0],))
            self._idle.observe((now_s - moments[1],))
