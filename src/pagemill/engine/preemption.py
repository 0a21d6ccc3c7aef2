"""Who gives way when blocks run short, and how much of it goes. Owns the choice; the scheduler carries it out.

Whoever entered first is never made to give way for one who entered later, across all tenants and for as long as it
lives. So at any moment there is one that only ever advances, it ends, and the next one takes its place: nobody starves,
and two can not send each other back for ever.

What a way costs is what is computed again: with its tail dropped a sequence waits where it is and recomputes the tail;
sent back whole it recomputes all but what the prefix cache still holds when it comes again.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import dataclass

from pagemill.cache.manager import CacheManager
from pagemill.engine.fairness import Shares
from pagemill.engine.request import Sequence, tenant_of


@dataclass(frozen=True, slots=True)
class Victim:
    """Who gives way. num_kept: positions that stay computed in its blocks; 0 where it goes back to its queue."""

    sequence: Sequence
    num_kept: int = 0


def choose_victim(
    needy: Sequence, num_tokens: int, running: Ordered[Sequence], shares: Shares, cache: CacheManager
) -> Victim | None:
    """Who gives way so that `needy` can have `num_tokens` positions: of those that entered after it, the last one of a
    tenant that runs more than its part, else the last one; within its tenant where that one's cap is what denies it.
    None where nobody can. running: by rank, which is the order of first entry."""
    later = [each for each in running[running.index(needy) + 1 :] if len(cache.block_table(each.seq_id))]
    if cache.is_capped(needy.seq_id, num_tokens):
        later = [each for each in later if cache.same_account(each.seq_id, needy.seq_id)]
    if not later:
        return None
    victim = later[-1]
    if len(shares.active) > 1:
        parts = {name: shares.fair(share, len(running)) for name, share in shares.active.items()}
        above = (
            each for each in reversed(later) if shares.active[tenant_of(each)].num_running > parts[tenant_of(each)]
        )
        victim = next(above, victim)
    return Victim(victim, _num_kept(victim, needy, num_tokens, running, cache))


def _num_kept(
    victim: Sequence, needy: Sequence, num_tokens: int, running: Ordered[Sequence], cache: CacheManager
) -> int:
    """Positions that the victim keeps where to drop its tail costs less than to send it back, else 0."""
    size, held = cache.block_size, len(cache.block_table(victim.seq_id))
    shared = cache.shared
    if cache.mode != "paged" or (shared is not None and not victim.request.cache.bypass):
        return 0  # what it computed stays to be found, and the cache drops what it needs of it, tail first
    if shared is not None and shared.windows is not None:
        return 0  # what a shorter text would read of its windows it has let go of
    stats = cache.stats()
    there = len(cache.block_table(needy.seq_id)) + stats.num_free_blocks + stats.num_cached_blocks
    short = cache.blocks_for(num_tokens) - there
    others = [each for each in running if each is not victim]
    horizon = min((each.request.longest - len(each.tokens) for each in others), default=0)
    wanted = sum(
        cache.blocks_for(len(each.tokens) + max(horizon, 0)) - len(cache.block_table(each.seq_id)) for each in others
    )
    if wanted >= held or short >= held:
        return 0  # all of it would go, block by block, before anybody ends
    return (held - max(short, 1)) * size
