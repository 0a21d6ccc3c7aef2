"""What an operator is shown of the cache, as one JSON object. Owns its shape; counting is the cache's.

`pagemill cache stats`, the admin endpoint and `LLM.cache.stats()` show this same object.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pagemill.base.errors import ConfigError
from pagemill.cache.manager import CacheManager
from pagemill.engine.engine import Engine

_DOUBLINGS = range(-3, 4)  # sizes of the curve: an eighth to eight times the cache
_MOST_SIZES = 256
_DIGITS = 6


def cache_stats(engine: Engine, sizes: Sequence[int] | None = None) -> dict[str, Any]:
    """Use of the cache now and what it found since the engine's start. To be called on the engine's thread.

    sizes: of the curve, in blocks; None for an eighth of the cache to eight times it. Cheap: O(tenants + sizes). Raises
    ConfigError for sizes below 1 or more than 256 of them.
    """
    engine.advance_clock()
    cache = engine.cache
    stats = cache.stats()
    sharing = cache.shared is not None
    return {
        "mode": cache.mode,
        "sharing": sharing,
        "policy": cache.shared.shelves.policy if cache.shared is not None else None,
        "block_tokens": cache.block_size,
        "sequences": stats.num_sequences,
        "blocks": {
            "total": stats.num_blocks,
            "free": stats.num_free_blocks,
            "active": stats.num_active_blocks,
            "cached": stats.num_cached_blocks,
            "held": stats.num_held_blocks,
            "pinned": stats.num_pinned_blocks,
            "evicted": stats.num_evicted_blocks,
            "left": dict(stats.num_left_blocks),
            "quarantined": stats.num_quarantined_blocks,
        },
        "rebuilds": stats.num_rebuilds,
        "tokens": {
            "asked": stats.num_asked_tokens,
            "hit": stats.num_hit_tokens,
            "hit_ratio": _ratio(stats.num_hit_tokens, stats.num_asked_tokens),
            "asked_again": stats.num_reentry_tokens,
            "hit_again": stats.num_reentry_hit_tokens,
        },
        "tenants": _tenants(cache),
        "curve": cache_curve(cache, sizes) if sharing else None,
    }


def cache_curve(cache: CacheManager, sizes: Sequence[int] | None = None) -> dict[str, Any]:
    """Expected hit ratio of whole blocks for each size, had the traffic seen met a cache that evicts the least recently
    used. recorded_blocks: uses seen; sampled_share: of all blocks, those that are followed. Raises as `cache_stats`.

    bytes of a point: in proportion to what this cache takes now, with its pages of layers that read a window; left out
    where nobody knows what a block takes.
    """
    if sizes is None:
        sizes = sorted({max(1, int(cache.num_blocks * 2.0**step)) for step in _DOUBLINGS})
    elif not isinstance(sizes, Sequence):
        raise ConfigError(f"sizes of the cache are a {type(sizes).__name__}; give a list of numbers of blocks")
    elif not 0 < len(sizes) <= _MOST_SIZES:
        raise ConfigError(f"{len(sizes)} sizes of the cache; give 1 to {_MOST_SIZES}")
    wrong = [size for size in sizes if isinstance(size, bool) or not isinstance(size, int)]
    if wrong:
        raise ConfigError(f"a size of the cache is {wrong[0]!r:.40}; give whole numbers of blocks")
    seen = cache.curve
    ratios = seen.curve(sizes)
    memory = None if cache.kv_spec is None else cache.kv_spec.memory_bytes(cache.num_blocks)
    return {
        "recorded_blocks": seen.num_recorded,
        "sampled_share": round(seen.sampled_share, _DIGITS),
        "points": [
            {"blocks": size, "tokens": size * cache.block_size}
            | ({} if memory is None else {"bytes": size * memory // cache.num_blocks})
            | {"hit_ratio": round(ratio, _DIGITS)}
            for size, ratio in zip(sizes, ratios, strict=True)
        ],
    }


def _tenants(cache: CacheManager) -> list[dict[str, Any]]:
    """Accounts that have blocks or a quota, in blocks."""
    if cache.shared is None:
        return []
    return [
        {
            "tenant": each.name,
            "used": each.used,
            "cached": each.cached,
            "pinned": each.pinned,
            "floor": each.floor,
            "cap": each.cap,
        }
        for each in cache.shared.tenancy.accounts
        if each.used or each.floor or each.cap is not None
    ]


def _ratio(part: int, whole: int) -> float | None:
    return round(part / whole, _DIGITS) if whole else None
