"""Which waiting sequence enters next. Owns the choice between tenants and within a queue, and what stands in the way.

Between tenants it is a matter of turns (`fairness.py`). In one tenant's queue a sequence may come before its turn where
more of its text is in the cache, which reads its own namespace and no other; and one whose text is just being computed
by another of the same namespace waits for that instead of computing it twice.

A tenant at its own cap stands in nobody's way. Where blocks themselves are short, whoever's turn it is holds the room
until it suffices: only tenants that stay within their floor, which nobody else could have, enter meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from typing import Literal

from pagemill.base.params import CacheOptions
from pagemill.cache.manager import CacheManager
from pagemill.cache.prefix import common_tokens
from pagemill.engine.admission import EngineLimits
from pagemill.engine.fairness import Share, Shares
from pagemill.engine.lateness import Pace, deadline_of
from pagemill.engine.queue import MOST_KEPT
from pagemill.engine.request import Sequence, tenant_of

LOOKAHEAD = 8  # of a tenant's queue
MOST_PASSED = 8  # how often one may be passed by those behind it
MOST_POSTPONED = 64  # of a tenant's queue at a time, while others run
WORTH_WAITING = 64  # tokens
_RETRY_PLANS = 8
_RECOUNT = 8  # choices after which hits are counted anew
_MOST_RECOUNTS = 2  # of a choice and tenant: to count is to look a whole text up
_MOST_PAIRS = 4096

_Fit = Literal["fits", "capped", "full"]


@dataclass(frozen=True, slots=True)
class Choice:
    """Who enters now, with so many tokens to compute; or, where hopeless, who could not even if nobody else ran."""

    sequence: Sequence
    num_unread: int
    hopeless: bool = False


class Entering:
    """Chooses who enters. Mutated by `choose`, `displaced`, `enters` and `changed`. running: the scheduler's own list.
    pace: by which those are found who will be late."""

    __slots__ = (
        "_blocked_room", "_cache", "_common", "_found", "_limits", "_num_choices", "_num_counted_gone", "_num_plans",
        "_num_recounts", "_pace", "_running", "_shares",
    )  # fmt: skip

    def __init__(
        self, limits: EngineLimits, cache: CacheManager, shares: Shares, pace: Pace, running: list[Sequence]
    ) -> None:
        self._limits = limits
        self._cache = cache
        self._shares = shares
        self._pace = pace
        self._running = running
        self._blocked_room: int | None = None  # blocks that were to be had when they did not suffice
        self._num_plans = 0
        self._common: dict[tuple[int, int], int] = {}
        self._found: dict[int, tuple[int, int]] = {}  # blocks of a waiting sequence that were there, at which choice
        self._num_choices = self._num_recounts = self._num_counted_gone = 0

    def changed(self) -> None:
        """Somebody came or went: what did not fit may fit now."""
        self._blocked_room = None

    def forget_hits(self) -> None:
        """The cache was rebuilt: nothing is known of what it holds."""
        self._found.clear()

    def choose(self, reading: Ordered[Sequence], now_s: float) -> Choice | None:
        """Who enters next, with place and blocks for it and a block of growth for each that runs: without this reserve
        the newcomer would soon be sent back and its prefill lost. None where nobody can. reading: those that run and
        read their prompt."""
        if len(self._running) >= self._limits.max_num_seqs or self._is_still_blocked():
            return None
        self._count_choice()
        short = False
        for share in self._shares.waiting():
            if short and not self._has_floor(share):
                continue
            candidate = self._candidate(share, reading, now_s)
            if candidate is None:
                continue
            fit = self._fit(candidate, short=short)
            if fit == "fits":
                return Choice(candidate, self._num_unread(candidate))
            if not short and self._is_hopeless(candidate, fit):
                return Choice(candidate, 0, hopeless=True)
            if fit == "full" and not short:
                short = True
                if not self._has_floors(candidate):
                    break
        if short:
            stats = self._cache.stats()
            self._blocked_room, self._num_plans = stats.num_free_blocks + stats.num_cached_blocks, 0
        return None

    def expired(self, sequence: Sequence) -> None:
        """The deadline of a sequence has passed, and it is taken out. Where it waited for its turn its place stays, so
        that nobody behind it comes within reach of those before it any sooner."""
        known = self._found.pop(sequence.seq_id, None)
        share = self._shares.active.get(tenant_of(sequence))
        if share is None or self._cache.shared is None or sequence.rank or sequence.is_late:
            return
        if not share.queue.would_keep(sequence):
            return
        if known is None and self._num_counted_gone < MOST_KEPT:  # to count is to look a whole text up
            self._num_counted_gone += 1
            known = self._count_found(sequence), 0
        share.queue.keep_place(sequence, 0 if known is None else known[0])

    def displaced(self, now_s: float) -> Sequence | None:
        """Who gives its place to the tenant whose turn it is: where places or blocks are taken, the last of a tenant
        that runs more than its part and has had more, as long as the other runs less than its own part."""
        shares, running = self._shares, self._running
        full = len(running) >= self._limits.max_num_seqs
        if len(shares.active) < 2 or self._cache.mode != "paged" or not (full or self._blocked_room is not None):
            return None
        share = shares.whose_turn
        over = None if share is None else shares.above_fair(share, len(running))
        if share is None or over is None or over.service <= share.service:
            return None
        reading = [each for each in running if each.blocks is not None and each.blocks.committed + 1 < len(each.tokens)]
        candidate = self._candidate(share, reading, now_s)
        if candidate is None or self._fit(candidate, short=False) == "capped":
            return None
        return next(each for each in reversed(running) if tenant_of(each) == over.name)

    def _count_choice(self) -> None:
        """Some of the hits that were counted long ago may be counted anew."""
        self._num_choices += 1
        self._num_recounts = self._num_counted_gone = 0
        if len(self._found) >= _MOST_PAIRS:
            self._found.clear()

    def _is_still_blocked(self) -> bool:
        """True where blocks were short and none have come free: asked again now and then, for hits may have grown."""
        if self._blocked_room is None or not self._running:
            return False
        self._num_plans += 1
        stats = self._cache.stats()
        if stats.num_free_blocks + stats.num_cached_blocks > self._blocked_room or self._num_plans >= _RETRY_PLANS:
            self._blocked_room = None
        return self._blocked_room is not None

    def _candidate(self, share: Share, reading: Ordered[Sequence], now_s: float) -> Sequence | None:
        """Who of a tenant's queue comes next; None where all at its front wait for a prompt that is being read.

        Whoever would come next and cannot end by its deadline any more goes behind all others. To those that it leaves
        that is as if it had entered: it has passed them, and none comes within reach any sooner.
        """
        num_gone = self._num_recounts = 0
        while num_gone < MOST_POSTPONED or not self._running:
            candidate = self._next_in_turn(share, reading)
            if candidate is None:
                return None
            if candidate.status == "finished":
                self.enters(share, candidate)
                share.queue.drop_place(candidate)
                continue
            if not self._will_be_late(candidate, reading, now_s):
                return candidate
            num_gone += 1
            self._count_choice()
            self.enters(share, candidate)
            share.queue.postpone(candidate)
        return None

    def _next_in_turn(self, share: Share, reading: Ordered[Sequence]) -> Sequence | None:
        """The same, whatever its deadline. One that will be late passes none that will not."""
        found: Sequence | None = None
        most, size = -1, self._cache.block_size
        best: Sequence | None = None
        for sequence in share.queue.first(LOOKAHEAD):
            if found is None:
                if self._awaits(sequence, reading):
                    continue
                found = best = sequence
                if sequence.rank or self._cache.shared is None or sequence.num_passed >= MOST_PASSED:
                    break
                continue
            if sequence.is_late and not found.is_late:
                break
            if sequence.request.params.priority != found.request.params.priority:
                if self._awaits(sequence, reading):
                    continue
                break
            most = self._num_found(found) if most < 0 else most
            if sequence.status != "finished" and -(-len(sequence.tokens) // size) <= most:
                continue
            if (count := self._num_found(sequence)) > most and not self._awaits(sequence, reading):
                best, most = sequence, count
        return best

    def _will_be_late(self, sequence: Sequence, reading: Ordered[Sequence], now_s: float) -> bool:
        """True where a sequence that has not run would end after its deadline if it entered now."""
        if sequence.request.params.deadline_s is None or sequence.is_late or sequence.rank:
            return False
        deadline_s = deadline_of(sequence)
        assert deadline_s is not None
        left_s, num_ahead = deadline_s - now_s, sum(map(_num_to_read, reading))
        if self._pace.seconds(sequence, num_ahead + len(sequence.tokens)) <= left_s:
            return False
        num_found = min(self._num_found(sequence) * self._cache.block_size, len(sequence.tokens) - 1)
        return self._pace.seconds(sequence, num_ahead + len(sequence.tokens) - num_found) > left_s

    def enters(self, share: Share, entering: Sequence) -> None:
        """`entering` leaves the queue to run: those in front of it have been passed once more."""
        self._found.pop(entering.seq_id, None)
        for each in share.queue.first(LOOKAHEAD):
            if each is entering:
                break
            each.num_passed += 1

    def _num_unread(self, sequence: Sequence) -> int:
        shared, num_tokens = self._cache.shared, len(sequence.tokens)
        if shared is None:
            return num_tokens
        return num_tokens - shared.entry(sequence.request.cache, sequence.tokens, num_tokens).num_hit

    def _num_found(self, sequence: Sequence) -> int:
        """Blocks of its text that its own namespace holds, or held a few choices ago."""
        if sequence.status == "finished":
            return sequence.num_found
        known = self._found.get(sequence.seq_id)
        if known is not None:
            if self._num_choices - known[1] < _RECOUNT or self._num_recounts == _MOST_RECOUNTS:
                return known[0]
            self._num_recounts += 1
        found = self._count_found(sequence)
        self._found[sequence.seq_id] = found, self._num_choices
        return found

    def _count_found(self, sequence: Sequence) -> int:
        shared, options = self._cache.shared, sequence.request.cache
        return 0 if shared is None or options.bypass else len(shared.chain_of(options, sequence.tokens))

    def _has_floors(self, sequence: Sequence) -> bool:
        """True where a floor is promised to any account, so that some may enter though blocks are short."""
        shared, beyond = self._cache.shared, self._cache.num_blocks + 1
        return shared is not None and shared.floor_error(beyond, sequence.request.cache) is not None

    def _has_floor(self, share: Share) -> bool:
        """True where one of those who may come next counts for an account with a floor."""
        shared = self._cache.shared
        return shared is not None and any(
            shared.account_of(each.request.cache).floor for each in share.queue.first(LOOKAHEAD)
        )

    def _awaits(self, sequence: Sequence, reading: Ordered[Sequence]) -> bool:
        """True where a running sequence of the same namespace is about to compute what this one begins with."""
        options, size = sequence.request.cache, self._cache.block_size
        if self._cache.shared is None or options.bypass or sequence.rank:
            return False
        first = sequence.first
        if first is not None and first.status == "running" and first.blocks is not None:
            return first.blocks.committed < sequence.request.num_prompt_tokens
        most = (len(sequence.tokens) - 1) // size * size
        for other in reading:
            if most >= WORTH_WAITING and other.blocks is not None and _same_namespace(other.request.cache, options):
                common = min(self._num_common(sequence, other) // size * size, most)
                if common - other.blocks.committed >= WORTH_WAITING:
                    return True
        return False

    def _num_common(self, sequence: Sequence, other: Sequence) -> int:
        """Tokens that two prompts begin with alike."""
        mine, its = sequence.request.prompt_token_ids, other.request.prompt_token_ids
        size = self._cache.block_size
        if mine[:size] != its[:size]:
            return 0
        pair = sequence.seq_id, other.seq_id
        known = self._common.get(pair)
        if known is None:
            if len(self._common) >= _MOST_PAIRS:
                self._common.clear()
            known = self._common[pair] = common_tokens(mine.tobytes(), its.tobytes())
        return known

    def _fit(self, sequence: Sequence, *, short: bool) -> _Fit:
        """Whether there are blocks for a sequence beside one for each that runs and may need one more. short: they did
        not suffice for one whose turn came before."""
        cache, options = self._cache, sequence.request.cache
        if cache.shared is None:
            spare = self._growth_beside(sequence)
            fits = not short and cache.can_open(len(sequence.tokens), self._limits.max_model_len, spare)
            return "fits" if fits else "full"
        entry = cache.shared.entry(options, sequence.tokens, len(sequence.tokens))
        account = entry.account
        if short and account.used - account.cached + entry.num_new + len(entry.shared) > account.floor:
            return "full"
        if entry.num_new > entry.num_room:
            return "full"
        own = 0 if account.cap is None else self._growth_of_account(sequence)
        if entry.num_new + own > entry.num_spare:
            return "capped"
        room = entry.num_room - entry.num_new
        return "fits" if room > len(self._running) or room >= self._growth_beside(sequence) else "full"

    def _growth_beside(self, sequence: Sequence) -> int:
        """Blocks that all who run may need next, and the sequence itself beside them."""
        return sum(map(self._num_to_grow, (*self._running, sequence))) if self._running else 0

    def _growth_of_account(self, sequence: Sequence) -> int:
        """Blocks that those who run at the same cap may need next, and the sequence itself beside them."""
        options = sequence.request.cache
        beside = [each for each in self._running if _same_account(each.request.cache, options)]
        return sum(map(self._num_to_grow, (*beside, sequence))) if beside else 0

    def _is_hopeless(self, sequence: Sequence, fit: _Fit) -> bool:
        """True where none of those that run could free what the sequence needs."""
        shared, options = self._cache.shared, sequence.request.cache
        if fit == "full":
            count = self._cache.blocks_for(len(sequence.tokens))
            return not self._running or (shared is not None and shared.floor_error(count, options) is not None)
        return not any(_same_account(each.request.cache, options) for each in self._running)

    def _num_to_grow(self, sequence: Sequence) -> int:
        """1 where the sequence may need more blocks than its known tokens do, else 0."""
        if self._cache.mode == "contiguous":
            return 0
        size = self._cache.block_size
        return int(-(-sequence.request.longest // size) > -(-len(sequence.tokens) // size))


def _num_to_read(sequence: Sequence) -> int:
    """Known tokens of a running sequence that are not computed."""
    assert sequence.blocks is not None
    return len(sequence.tokens) - sequence.blocks.committed


def _same_namespace(one: CacheOptions, other: CacheOptions) -> bool:
    return (
        not one.bypass
        and one.salt == other.salt
        and one.public == other.public
        and (one.public is not None or one.tenant == other.tenant)
    )


def _same_account(one: CacheOptions, other: CacheOptions) -> bool:
    return one.public == other.public and (one.public is not None or one.tenant == other.tenant)
