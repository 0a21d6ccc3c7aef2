"""R14: days of a server from seeds (`tests/fixtures/serving.py`): the real scheduler, admission and cache with tenants,
bursts, priorities, deadlines, queues that are full, clients that leave and steps that fail, in virtual time."""

from __future__ import annotations

from collections import Counter

from tests.fixtures.serving import run_day
from tests.trust.figures import Figure


def count(seeds: range) -> Figure:
    """Days in which a promise was broken: an answer that is not the specification's, a request that starves, a turn
    wasted, a block lost."""
    replays, met = [], Counter({"requests refused": 0, "tails dropped": 0, "choices": 0, "clients that left": 0})
    for seed in seeds:
        try:
            day = run_day(seed)
        except BaseException as error:  # the specification's executor speaks up with one of its own
            if isinstance(error, KeyboardInterrupt):
                raise
            told = f"{type(error).__name__}: {error}"
            replays.append(f'python -c "from tests.fixtures.serving import run_day; run_day({seed})"  # {told:.300}')
            continue
        met["requests refused"] += day.num_refused
        met["tails dropped"] += day.num_tails_dropped
        met["choices"] += sum(day.ended.values())
        met["clients that left"] += day.ended.get("abort", 0)
    return Figure("R14", "days of a server gone wrong", len(replays), len(seeds), "days", dict(met), replays)
