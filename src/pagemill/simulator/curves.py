"""Hit ratios of policies over sizes of the cache, as rows. Owns which bounds stand beside a policy.

Rows are plain values that a table, a plot and JSON are made of; time is measured by an injected clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pagemill.base.clock import Clock
from pagemill.base.errors import ConfigError
from pagemill.cache.policies.registry import POLICIES, Makers, make_policy
from pagemill.simulator.replay import prepare, replay, replay_ideal, replay_manager, replay_optimum
from pagemill.simulator.trace import Request, Trace


@dataclass(frozen=True, slots=True)
class HitRow:
    """One policy at one size. ideal: of a cache that never evicts; optimum: Belady's at this size; later: over the
    second half of the requests. accesses_per_s: of the replay, blocks."""

    trace: str
    policy: str
    blocks: int
    block_hit_ratio: float
    later_hit_ratio: float
    ideal: float
    optimum: float
    num_evictions: int
    accesses_per_s: float


@dataclass(frozen=True, slots=True)
class AllocationRow:
    """Positions allocated and not used by `concurrency` sequences that generate at once, of those allocated: the mean
    over the steps and the 99th percentile."""

    trace: str
    block_tokens: int
    concurrency: int
    num_steps: int
    unused_mean: float
    unused_p99: float


def hit_curves(
    trace: Trace,
    policies: Sequence[str],
    blocks: Sequence[int],
    clock: Clock,
    report: Callable[[str], None] = lambda text: None,
    *,
    manager: bool = False,
    makers: Makers = POLICIES,
) -> list[HitRow]:
    """A row for each size and policy. manager: over the engine's cache manager, not the policy alone. makers: of the
    policies.

    Raises ConfigError for unknown policies, sizes below 1, traces without blocks.
    """
    for name in policies:
        make_policy(name, min(blocks), makers)
    prepared = prepare(trace)
    ideal = replay_ideal(trace).block_hit_ratio
    rows = []
    for size in blocks:
        report(f"{size:,} blocks: optimum")
        optimum = replay_optimum(trace, size).block_hit_ratio
        for name in policies:
            report(f"{size:,} blocks: {name}")
            start_s = clock.now()
            if manager:
                done = replay_manager(trace, name, size, makers)
            else:
                done = replay(trace, make_policy(name, size, makers), size, prepared)
            taken_s = max(clock.now() - start_s, 1e-9)
            rows.append(
                HitRow(
                    trace=trace.name,
                    policy=name,
                    blocks=size,
                    block_hit_ratio=done.block_hit_ratio,
                    later_hit_ratio=done.later_hit_ratio,
                    ideal=ideal,
                    optimum=optimum,
                    num_evictions=done.num_evictions,
                    accesses_per_s=done.num_accesses / taken_s,
                )
            )
    return rows


def allocation(trace: Trace, block_tokens: int = 16, concurrency: int = 32) -> AllocationRow:
    """Lengths alone: sequences in whole blocks, the prompt at once, then a token each step; the next follows at once.

    Raises ConfigError for sizes below 1 and for a trace without requests.
    """
    if block_tokens < 1 or concurrency < 1:
        raise ConfigError("blocks of no tokens, or no sequences at once, allocate nothing; give numbers from 1")
    if not trace.requests:
        raise ConfigError(f"{trace.name} has no requests; give a longer trace")
    waiting = iter(trace.requests)
    running: list[list[int]] = []
    shares: list[float] = []
    while True:
        while len(running) < concurrency and (request := next(waiting, None)) is not None:
            running.append(_lengths(request))
        if not running:
            break
        used = sum(each[0] for each in running)
        allocated = sum(-(-each[0] // block_tokens) for each in running) * block_tokens
        shares.append(1 - used / allocated)
        for each in running:
            each[0] += 1
        running = [each for each in running if each[0] <= each[1]]
    shares.sort()
    return AllocationRow(
        trace=trace.name,
        block_tokens=block_tokens,
        concurrency=concurrency,
        num_steps=len(shares),
        unused_mean=math.fsum(shares) / len(shares),
        unused_p99=shares[math.ceil(len(shares) * 0.99) - 1],
    )


def _lengths(request: Request) -> list[int]:
    """[positions written, positions when the last token has come]."""
    prompt = max(1, request.num_input_tokens)
    return [prompt, prompt + max(0, request.num_output_tokens - 1)]
