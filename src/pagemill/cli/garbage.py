"""When a server collects garbage. Owns how often, and that old objects wait for a moment without requests.

A connection is some 200 objects that the collector looks through. By its own thresholds a full collection comes with
every 70,000 new ones, which 500 connections that come and go make every few seconds, and takes 20 to 100 ms, in which
no step begins and no token leaves.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from typing import Final

# New objects before the young are collected, times that before the middle-aged are, times that before all are: two
# million new objects instead of 70,000. What one collection of the middle-aged looks through takes a few ms.
THRESHOLDS: Final = (10_000, 5, 40)
PAUSE_S: Final = 30.0


def settle() -> None:
    """Call what is there now permanent, so that no collection looks at it, and collect less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)


async def collect_in_pauses(
    is_idle: Callable[[], bool], *, sleep: Callable[[float], Awaitable[object]] = asyncio.sleep
) -> None:
    """Collect all garbage, for ever: twice a minute at the most, where there is no request and anything was collected
    since."""
    while True:
        await sleep(PAUSE_S)
        if is_idle() and any(gc.get_count()[1:]):
            gc.collect()
