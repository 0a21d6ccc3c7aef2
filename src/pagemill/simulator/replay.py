"""Replays a trace over eviction policies, without a model. Owns what a hit is, and the bounds that no policy passes.

Definitions. A request hits the leading run of its blocks that are present. Then its whole chain is used, last block
first, and what was missing is inserted; nothing is pinned and outputs are not inserted. The block hit ratio is hits
over blocks, all requests together.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from dataclasses import dataclass
from heapq import heappop, heappush

from pagemill.base.errors import ConfigError
from pagemill.cache.entry import SharingConfig
from pagemill.cache.manager import CacheManager
from pagemill.cache.policies.base import BlockInfo, Policy
from pagemill.cache.policies.registry import make_policy
from pagemill.simulator.trace import Trace

_KEY_BYTES = 8
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


def replay(trace: Trace, policy: Policy, capacity: int) -> Replayed:
    """Replay over a fresh policy for a cache of `capacity` blocks. Raises ConfigError for a trace without blocks."""
    score = _Score(trace)
    keys = {each: each.to_bytes(_KEY_BYTES, "little") for request in trace.requests for each in request.blocks}
    infos: dict[tuple[int, int], BlockInfo] = {}
    where: dict[int, int] = {}
    held = [-1] * capacity
    free = list(range(capacity - 1, -1, -1))
    touch, insert, victim, remove, on_miss = (
        policy.touch,
        policy.insert,
        policy.victim,
        policy.remove,
        policy.on_miss,
    )
    find = where.get
    num_evictions = 0
    for request in trace.requests:
        ids = request.blocks
        num_blocks = len(ids)
        num_hits = 0
        for each in ids:
            if each not in where:
                break
            num_hits += 1
        score.add(num_hits, num_blocks)
        for depth in range(num_blocks - 1, -1, -1):
            each = ids[depth]
            block = find(each)
            if block is not None:
                touch(block)
                continue
            key = keys[each]
            on_miss(key)
            if free:
                block = free.pop()
            else:
                chosen = victim()
                assert chosen is not None, "nothing is locked, so that something can go"
                remove(chosen, True)
                del where[held[chosen]]
                block = chosen
                num_evictions += 1
            filled = min(trace.block_tokens, request.num_input_tokens - depth * trace.block_tokens)
            info = infos.get((depth, filled))
            if info is None:
                info = infos[depth, filled] = BlockInfo(num_tokens=filled, depth=depth)
            insert(block, key, info)
            where[each] = block
            held[block] = each
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


def replay_manager(trace: Trace, policy: str, capacity: int) -> Replayed:
    """Replay over the cache manager of the engine: keys, comparison of tokens, publication, leaves before parents.

    Each block of the trace becomes four tokens of its own. A request is opened, committed and closed before the next
    one comes; one that is longer than the whole cache counts and hits nothing. Evictions are not counted. Raises
    ConfigError for a trace without blocks and an unknown policy.
    """
    score = _Score(trace)
    make_policy(policy, capacity)
    manager = CacheManager(capacity, _MANAGER_BLOCK_TOKENS, sharing=SharingConfig(policy=policy))
    for index, request in enumerate(trace.requests):
        num_blocks = len(request.blocks)
        if not 0 < num_blocks <= capacity:
            score.add(0, num_blocks)
            continue
        tokens = array("i")
        for each in request.blocks:
            tokens.extend((each & _LOW_BITS, each >> 31, 0, 0))
        num_tokens = len(tokens)
        found = manager.open(index, num_tokens, num_tokens, tokens)
        # The last token of a prompt is always computed: all of it found is one less.
        score.add((found.num_hit + 1) // _MANAGER_BLOCK_TOKENS, num_blocks)
        manager.commit(index, num_tokens)
        manager.close(index)
        manager.moved(manager.moves())
    return score.done(0)
