"""Replays a trace over eviction policies, without a model. Owns what a hit is, and the bounds that no policy passes.

Definitions. A request hits the leading run of its blocks that are present. Then its whole chain is used, last block
first, and what was missing is inserted; nothing is pinned and outputs are not inserted. The block hit ratio is hits
over blocks, all requests together.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from pagemill.base.errors import ConfigError
from pagemill.cache.entry import SharingConfig
from pagemill.cache.manager import CacheManager
from pagemill.cache.policies.base import BlockInfo, Policy
from pagemill.cache.policies.registry import POLICIES, Makers, make_policy
from pagemill.simulator.trace import Trace

_KNOWN = 2  # blocks found, as told to policies of requests that found more than one
_KEY_BYTES = 8
_KEY_MASK = (1 << 64) - 1
_SPREAD = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: a multiplication that spreads numbers and loses none
_MANAGER_BLOCK_TOKENS = 4
_LOW_BITS = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a replay counted. hits, accesses: blocks. later: the same of the second half of the requests."""

    num_hits: int
    num_accesses: int
    num_later_hits: int
    num_later_accesses: int
    num_evictions: int = 0

    @property
    def block_hit_ratio(self) -> float:
        return self.num_hits / max(1, self.num_accesses)

    @property
    def later_hit_ratio(self) -> float:
        """The ratio over the second half of the requests alone."""
        return self.num_later_hits / max(1, self.num_later_accesses)


@dataclass(frozen=True, slots=True)
class Chain:
    """A request's blocks, the last of its prompt first. blocks: their numbers; keys: 8 bytes each that are spread
    evenly; infos: what a policy is told of each, where the request found one block at the most, and where more."""

    blocks: tuple[int, ...]
    keys: tuple[bytes, ...]
    infos: tuple[tuple[BlockInfo, ...], tuple[BlockInfo, ...]]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A trace as `replay` reads it: the same for all policies and sizes. num_distinct: numbers of blocks are below."""

    num_distinct: int
    chains: tuple[Chain, ...]


def prepare(trace: Trace) -> Prepared:
    """The trace's blocks numbered from 0. Raises ConfigError where a request names a block twice."""
    numbers: dict[int, int] = {}
    keys: list[bytes] = []
    made: dict[tuple[int, int, int], tuple[BlockInfo, ...]] = {}
    chains = []
    for index, request in enumerate(trace.requests):
        blocks = tuple([numbers.setdefault(each, len(numbers)) for each in reversed(request.blocks)])
        if len(set(blocks)) != len(blocks):
            raise ConfigError(f"{trace.name}: request {index:,} names a block twice; blocks differ in their position")
        while len(keys) < len(numbers):
            keys.append((len(keys) * _SPREAD & _KEY_MASK).to_bytes(_KEY_BYTES, "big"))
        filled = request.num_input_tokens - (len(blocks) - 1) * trace.block_tokens
        fresh, known = (_infos(made, len(blocks), trace.block_tokens, filled, known) for known in (0, _KNOWN))
        chains.append(Chain(blocks, tuple([keys[each] for each in blocks]), (fresh, known)))
    return Prepared(len(numbers), tuple(chains))


def _infos(
    made: dict[tuple[int, int, int], tuple[BlockInfo, ...]], num_blocks: int, size: int, filled: int, known: int
) -> tuple[BlockInfo, ...]:
    """What is known of the blocks of a chain, the last one first; all but that shared by chains of one length."""
    full = made.get((num_blocks, size, known))
    if full is None:
        full = made[num_blocks, size, known] = tuple(
            BlockInfo(size, depth, text_tokens=num_blocks * size, num_known_blocks=known)
            for depth in range(num_blocks - 1, -1, -1)
        )
    if filled >= size or not num_blocks:
        return full
    found = made.get((num_blocks, filled, known))
    if found is None:
        last = BlockInfo(filled, num_blocks - 1, text_tokens=num_blocks * size, num_known_blocks=known)
        found = made[num_blocks, filled, known] = (last, *full[1:])
    return found


class _Score:
    """Hits so far. Mutated by `add`."""

    __slots__ = ("_accesses", "_half", "_hits", "_num_requests")

    def __init__(self, trace: Trace) -> None:
        if not any(each.blocks for each in trace.requests):
            raise ConfigError(
                f"{trace.name} has no block ids, so that nothing can hit; give a trace with prompts' blocks"
            )
        self._half = len(trace.requests) // 2
        self._hits = [0, 0]
        self._accesses = [0, 0]
        self._num_requests = 0

    def add(self, num_hits: int, num_blocks: int) -> None:
        half = self._num_requests >= self._half
        self._num_requests += 1
        self._hits[half] += num_hits
        self._accesses[half] += num_blocks

    def done(self, num_evictions: int) -> Replayed:
        return Replayed(sum(self._hits), sum(self._accesses), self._hits[1], self._accesses[1], num_evictions)


def replay(trace: Trace, policy: Policy, capacity: int, prepared: Prepared | None = None) -> Replayed:
    """Replay over a fresh policy for a cache of `capacity` blocks. prepared: the trace, where it has been prepared.

    A block's name for the policy is its number among the different blocks of the trace, so that nothing has to be kept
    of it but whether it is there. Raises ConfigError for a trace without blocks.
    """
    score = _Score(trace)
    prepared = prepared or prepare(trace)
    there = bytearray(prepared.num_distinct)
    is_there = there.__getitem__
    touch_all, replace = policy.touch_all, policy.replace
    num_free, num_evictions = capacity, 0
    for chain in prepared.chains:
        blocks, keys = chain.blocks, chain.keys
        present = bytes(map(is_there, blocks))
        num_blocks = len(blocks)
        num_hits = num_blocks - 1 - present.rfind(0)
        score.add(num_hits, num_blocks)
        infos = chain.infos[num_hits > 1]
        at = 0
        while at < num_blocks:
            end = present.find(not present[at], at)
            end = num_blocks if end < 0 else end
            if present[at]:
                touch_all(blocks[at:end])
                at = end
                continue
            while num_free and at < end:
                policy.on_miss(keys[at])
                policy.insert(blocks[at], keys[at], infos[at])
                there[blocks[at]] = 1
                num_free -= 1
                at += 1
            if at == end:
                continue
            run = blocks[at:end]
            for each in run:
                there[each] = 1
            for each in replace(run, keys[at:end], infos[at:end]):
                there[each] = 0
            num_evictions += end - at
            at = end
            if at < num_blocks:  # victims may be of this chain
                present = present[:at] + bytes(map(is_there, blocks[at:]))
    return score.done(num_evictions)


def replay_lru(trace: Trace, capacity: int) -> Replayed:
    """What `replay` counts with the policy "lru", several times as fast: for long traces and for checking the other."""
    score = _Score(trace)
    order: OrderedDict[int, None] = OrderedDict()
    to_end, drop = order.move_to_end, order.popitem
    num_evictions = 0
    for request in trace.requests:
        ids = request.blocks
        num_hits = 0
        for each in ids:
            if each not in order:
                break
            num_hits += 1
        score.add(num_hits, len(ids))
        for each in reversed(ids):
            if each in order:
                to_end(each)
                continue
            if len(order) >= capacity:
                drop(last=False)
                num_evictions += 1
            order[each] = None
    return score.done(num_evictions)


def replay_ideal(trace: Trace) -> Replayed:
    """A cache that never evicts."""
    score = _Score(trace)
    seen: set[int] = set()
    for request in trace.requests:
        num_hits = 0
        for each in request.blocks:
            if each not in seen:
                break
            num_hits += 1
        score.add(num_hits, len(request.blocks))
        seen.update(request.blocks)
    return score.done(0)


def replay_optimum(trace: Trace, capacity: int) -> Replayed:
    """Belady's rule: the block whose next request is farthest away leaves, or is not let in; of a chain the last first.

    Optimal for hits of single blocks (Belady, IBM Systems Journal 5, 1966); hits of leading runs follow it closely.
    """
    score = _Score(trace)
    following = _next_requests(trace)
    due: dict[int, tuple[int, int]] = {}
    farthest: list[tuple[int, int, int]] = []
    at = num_evictions = 0
    for request in trace.requests:
        ids = request.blocks
        num_hits = 0
        for each in ids:
            if each not in due:
                break
            num_hits += 1
        score.add(num_hits, len(ids))
        for depth, each in enumerate(ids):
            soonest_last = (-following[at], -depth)
            at += 1
            if each not in due and len(due) >= capacity:
                while due.get(farthest[0][2]) != farthest[0][:2]:
                    heappop(farthest)
                if farthest[0][:2] >= soonest_last:
                    continue
                del due[heappop(farthest)[2]]
                num_evictions += 1
            due[each] = soonest_last
            heappush(farthest, (*soonest_last, each))
    return score.done(num_evictions)


def _next_requests(trace: Trace) -> list[int]:
    """For each block of each request, in order, the index of the next request that uses it (their number: none)."""
    following = [len(trace.requests)] * trace.num_accesses
    latest: dict[int, int] = {}
    at = 0
    for index, request in enumerate(trace.requests):
        for each in request.blocks:
            before = latest.get(each)
            if before is not None:
                following[before] = index
            latest[each] = at
            at += 1
    return following


def replay_manager(trace: Trace, policy: str, capacity: int, makers: Makers = POLICIES) -> Replayed:
    """Replay over the cache manager of the engine: keys, comparison of tokens, publication, leaves before parents.

    Each block of the trace becomes four tokens of its own. A request is opened, committed and closed before the next
    one comes; one that is longer than the whole cache counts and hits nothing. Raises ConfigError for a trace
    without blocks and an unknown policy.
    """
    score = _Score(trace)
    make_policy(policy, capacity, makers)
    manager = CacheManager(capacity, _MANAGER_BLOCK_TOKENS, sharing=SharingConfig(policy=policy, makers=makers))
    for index, request in enumerate(trace.requests):
        num_blocks = len(request.blocks)
        if not 0 < num_blocks <= capacity:
            score.add(0, num_blocks)
            continue
        num_tokens = num_blocks * _MANAGER_BLOCK_TOKENS
        found = manager.open(index, num_tokens, num_tokens, _tokens_of(request.blocks))
        # The last token of a prompt is always computed: all of it found is one less.
        score.add((found.num_hit + 1) // _MANAGER_BLOCK_TOKENS, num_blocks)
        manager.commit(index, num_tokens)
        manager.close(index)
        manager.moved(manager.moves())
    return score.done(manager.stats().num_evicted_blocks)


def _tokens_of(blocks: Sequence[int]) -> array[int]:
    """A text in which each of these numbers, below 2^62, stands for a block."""
    tokens = array("i", bytes(4 * _MANAGER_BLOCK_TOKENS * len(blocks)))
    tokens[::_MANAGER_BLOCK_TOKENS] = array("i", [each & _LOW_BITS for each in blocks])
    if max(blocks) > _LOW_BITS:
        tokens[1::_MANAGER_BLOCK_TOKENS] = array("i", [each >> 31 for each in blocks])
    return tokens
