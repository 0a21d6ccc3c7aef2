"""What the control plane does without a model: unused positions, hit ratios on a trace, eviction at a million blocks.

Owns these runs. The scheduler and the cache are the engine's own; an executor that computes nothing answers for the
model.
"""

from __future__ import annotations

import random
import time

from pagemill.base.clock import MonotonicClock
from pagemill.base.errors import ConfigError
from pagemill.base.params import SamplingParams
from pagemill.base.step import Sample, StepPlan, StepResult
from pagemill.bench.cache_figures import Figure, Settings, Tell, decode_nothing, raise_failures, random_ids
from pagemill.bench.report import Row
from pagemill.cache.entry import SharingConfig
from pagemill.cache.keys import TOKEN_BYTES
from pagemill.cache.manager import CacheManager
from pagemill.cache.policies.base import BlockInfo
from pagemill.cache.policies.registry import make_policy
from pagemill.engine.admission import EngineLimits
from pagemill.engine.engine import Engine
from pagemill.kernels.policies import POLICIES
from pagemill.simulator.curves import hit_curves
from pagemill.simulator.trace import read_trace
from pagemill.simulator.workload import generate

UNUSED, HITS, EVICTION = "unused", "hits", "eviction"
UNUSED_MEAN_GOAL, UNUSED_P99_GOAL = 0.007, 0.010
SIZES = (1000, 2930, 5859, 10_000, 30_000)
# Block hit ratio that the best policy must reach on the trace that the goals are written for.
HIT_GOALS = {5859: 0.160, 10_000: 0.230}
GOAL_TRACE_BLOCKS = 288_500
COMPARED = ("lru", "gittins", "adaptive")
ADAPTIVE_MARGIN = 0.003
EVICTION_GOAL_US = 20.0

_DECISIONS = 20_000
_CONCURRENT = 32
_BLOCK_TOKENS = 16
_VOCAB_SIZE = 32_000
_POOL_EVERY = 32
# Lengths of the Azure LLM inference trace of conversations (Splitwise, ISCA 2024, figure 3): medians of prompt and
# answer, and how widely they spread, as log-normal numbers.
_PROMPT_MEDIAN, _PROMPT_SPREAD, _PROMPT_MOST = 1020, 0.9, 8000
_ANSWER_MEDIAN, _ANSWER_SPREAD, _ANSWER_MOST = 129, 1.0, 1500


class Answering:
    """An executor that computes nothing and answers every row with the same token. Mutated by `run`.

    most_part_filled: blocks that were not full of a sequence whose text was all known, the most of any row.
    """

    def __init__(self) -> None:
        self.most_part_filled = 0

    def run(self, plan: StepPlan) -> StepResult:
        """One sample for each row that asks for one."""
        rows = [each for each in plan.sequences if each.sample]
        for each in rows:
            self.most_part_filled = max(self.most_part_filled, len(each.block_table) - each.end // _BLOCK_TOKENS)
        return StepResult(tuple(Sample(each.seq_id, 1) for each in rows))

    def resize(self, num_blocks: int) -> None:
        """There are no bytes."""


def azure_like_lengths(count: int, seed: int) -> list[tuple[int, int]]:
    """(prompt, answer) lengths in tokens, as the conversations of Azure's trace have them, from a seed."""
    source = random.Random(seed)

    def draw(median: int, spread: float, most: int) -> int:
        return min(most, max(1, round(median * source.lognormvariate(0.0, spread))))

    return [
        (
            draw(_PROMPT_MEDIAN, _PROMPT_SPREAD, _PROMPT_MOST),
            draw(_ANSWER_MEDIAN, _ANSWER_SPREAD, _ANSWER_MOST),
        )
        for _ in range(count)
    ]


def measure_unused(settings: Settings, tell: Tell) -> list[Figure]:
    """Positions of allocated blocks that no sequence was granted, step by step: of those in use by 32 sequences, and of
    the whole pool, cached texts included. Raises ConfigError for a trace without requests."""
    most = settings.size(3000, 120)
    if settings.lengths is None:
        name, lengths = "Azure-like lengths", azure_like_lengths(most, settings.seed)
    else:
        trace = read_trace(settings.lengths)
        name = trace.name
        lengths = [(max(1, e.num_input_tokens), max(1, e.num_output_tokens)) for e in trace.requests[:most]]
        if not lengths:
            raise ConfigError(f"{trace.name} has no requests; give a longer --lengths")
    tell(f"unused positions: {len(lengths):,} requests of {name}, {_CONCURRENT} at a time")
    active, pool, most_part_filled = _allocate(lengths, settings.seed)
    work = f"{name}, {_CONCURRENT} at a time, blocks of {_BLOCK_TOKENS}"
    mean_goal = None if settings.quick else UNUSED_MEAN_GOAL
    p99_goal = None if settings.quick else UNUSED_P99_GOAL
    found = []
    for mode, shares in (("in use", active), ("whole pool", pool)):
        whole = Row("", "", "", tuple(shares))
        found.append(Figure(UNUSED, Row(work, f"{mode}, mean", "share", (whole.mean,)), at_most=mean_goal))
        found.append(Figure(UNUSED, Row(work, f"{mode}, p99", "share", (whole.quantile(0.99),)), at_most=p99_goal))
    row = Row(work, "part-filled blocks a sequence, most", "blocks", (float(most_part_filled),))
    found.append(Figure(UNUSED, row, at_most=1))
    return found


def _allocate(lengths: list[tuple[int, int]], seed: int) -> tuple[list[float], list[float], int]:
    """Shares unused at each step, of the pool at every 32nd, and the most part-filled blocks that a sequence had."""
    longest = max(prompt + answer for prompt, answer in lengths) + 1
    num_blocks = 2 * _CONCURRENT * -(-longest // _BLOCK_TOKENS)
    cache = CacheManager(num_blocks, _BLOCK_TOKENS, "paged", SharingConfig())
    limits = EngineLimits(longest + 1, _VOCAB_SIZE, _CONCURRENT, max(2048, longest))
    executor = Answering()
    engine = Engine(executor, cache, limits, decode_nothing, MonotonicClock(), seed=0)
    source = random.Random(seed)
    waiting = list(enumerate(lengths))[::-1]
    active: list[float] = []
    pool: list[float] = []
    steps = 0
    while waiting or engine.has_unfinished:
        while waiting and engine.stats().num_running + engine.stats().num_waiting < _CONCURRENT:
            index, (prompt, answer) = waiting.pop()
            params = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True, seed=0)
            engine.add_request(str(index), random_ids(source, prompt, _VOCAB_SIZE), params)
        raise_failures(engine.step())
        stats = cache.stats()
        steps += 1
        if waiting and stats.num_sequences == _CONCURRENT:
            active.append(stats.num_unused_positions / (stats.num_active_blocks * _BLOCK_TOKENS))
            if steps % _POOL_EVERY == 0:
                pool.append(_pool_share(cache))
    if not pool:
        raise ConfigError(f"{len(lengths)} requests never fill {_CONCURRENT} places; give a longer --lengths")
    return active, pool, executor.most_part_filled


def _pool_share(cache: CacheManager) -> float:
    """Unused positions of all blocks that are in use or cached, of all their positions."""
    stats, shared = cache.stats(), cache.shared
    assert shared is not None
    short = sum(_BLOCK_TOKENS - len(node.tokens) // TOKEN_BYTES for node in shared.tree.nodes.values())
    allocated = (stats.num_active_blocks + stats.num_cached_blocks) * _BLOCK_TOKENS
    return (stats.num_unused_positions + short) / allocated


def measure_hits(settings: Settings, tell: Tell) -> list[Figure]:
    """Block hit ratios of policies on a trace, by the simulator. Goals stand where it is the one they are for."""
    if settings.trace is not None:
        trace = read_trace(settings.trace)
    else:
        trace = generate("chat", settings.size(4000, 300), settings.seed)
    sizes = SIZES if not settings.quick else (200, 1000)
    rows = hit_curves(trace, COMPARED, sizes, MonotonicClock(), tell, makers=POLICIES)
    known = trace.num_accesses == GOAL_TRACE_BLOCKS
    lru = {each.blocks: each.block_hit_ratio for each in rows if each.policy == "lru"}
    found = []
    for each in rows:
        goal = None
        if each.policy == "adaptive":
            goal = lru[each.blocks] - ADAPTIVE_MARGIN
        elif known and each.policy == "gittins":
            goal = HIT_GOALS.get(each.blocks)
        more = {"blocks": each.blocks, "ideal": each.ideal, "optimum": each.optimum, "policy": each.policy}
        row = Row(f"{trace.name}, {each.blocks:,} blocks", each.policy, "hit ratio", (each.block_hit_ratio,))
        found.append(Figure(HITS, row, at_least=goal, more=more))
    return found


def eviction_decision_seconds(name: str, num_blocks: int) -> float:
    """Mean CPU seconds of one decision of a policy that holds `num_blocks`: which block leaves, its removal, the one
    that comes instead, and a hit on another."""
    policy = make_policy(name, num_blocks, POLICIES)
    info = BlockInfo()
    for block in range(num_blocks):
        policy.insert(block, block.to_bytes(32, "little"), info)
    source = random.Random(0)
    hits = [source.randrange(num_blocks) for _ in range(_DECISIONS)]
    began = time.thread_time()
    for at, hit in enumerate(hits):
        policy.touch(hit)
        key = (num_blocks + at).to_bytes(32, "little")
        policy.on_miss(key)
        victim = policy.victim()
        assert victim is not None
        policy.remove(victim, True)
        policy.insert(victim, key, info)
    return (time.thread_time() - began) / _DECISIONS


def measure_eviction(settings: Settings, tell: Tell) -> list[Figure]:
    """Seconds of a decision of each policy that holds a million blocks: who leaves, and taking in the next."""
    num_blocks = settings.size(1_000_000, 20_000)
    found = []
    for name in POLICIES:
        tell(f"eviction by {name} at {num_blocks:,} blocks")
        samples = tuple(1e6 * eviction_decision_seconds(name, num_blocks) for _ in range(min(settings.num_runs, 3)))
        row = Row(f"eviction decision at {num_blocks:,} blocks", name, "us", samples)
        goal = None if settings.quick else EVICTION_GOAL_US
        found.append(Figure(EVICTION, row, at_most=goal, more={"policy": name}))
    return found
