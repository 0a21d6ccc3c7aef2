"""The online curve against the simulator: a trace through the engine's cache of one size, and what it then expects of
others beside what caches of these sizes hit. Owns this comparison."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

from pagemill.base.clock import MonotonicClock
from pagemill.base.errors import ConfigError
from pagemill.bench.cache_control import Answering
from pagemill.bench.cache_figures import decode_nothing
from pagemill.cache.entry import SharingConfig
from pagemill.cache.manager import CacheManager
from pagemill.engine.admission import EngineLimits
from pagemill.engine.cache_stats import cache_stats
from pagemill.engine.engine import Engine
from pagemill.simulator.replay import replay_lru
from pagemill.simulator.trace import Trace

BLOCK_TOKENS = 4  # of the replay: each block of the trace becomes so many tokens of its own
_LOW_BITS = (1 << 31) - 1


def replayed_stats(trace: Trace, num_blocks: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """`cache_stats` of a cache of `num_blocks` blocks after the whole trace, request by request, with "simulated" in
    each point of the curve: the simulator's block hit ratio under least recently used.

    A text longer than the cache is looked up by nobody. Raises ConfigError for a trace without block ids.
    """
    if not any(each.blocks for each in trace.requests):
        raise ConfigError(f"{trace.name} has no block ids, so that nothing can hit; give a trace with prompts' blocks")
    tell(f"{len(trace.requests):,} requests over {num_blocks:,} blocks")
    cache = CacheManager(num_blocks, BLOCK_TOKENS, sharing=SharingConfig())
    longest = BLOCK_TOKENS * num_blocks + 2
    engine = Engine(Answering(), cache, EngineLimits(longest, _LOW_BITS + 1), decode_nothing, MonotonicClock(), seed=0)
    for index, request in enumerate(trace.requests):
        if not 0 < len(request.blocks) < num_blocks:
            continue
        tokens = array("i")
        for each in request.blocks:
            tokens.extend((each & _LOW_BITS, each >> 31, 0, 0))
        num_tokens = len(tokens)
        tokens.append(0)  # the last token of a prompt is always computed: so that the last block is looked up
        cache.open(index, num_tokens + 1, num_tokens + 1, tokens)
        cache.commit(index, num_tokens)
        cache.resize(index, num_tokens)
        cache.close(index)
        cache.moved(cache.moves())
    found = cache_stats(engine)
    for point in found["curve"]["points"]:
        tell(f"simulating {point['blocks']:,} blocks")
        point["simulated"] = round(replay_lru(trace, point["blocks"]).block_hit_ratio, 6)
    return {"trace": trace.name} | found
