"""Who runs in the next step, and how many tokens of each. Owns the running sequences and puts the parts together.

Continuous batching (Orca, OSDI 2022) over a paged cache (vLLM, arXiv 2309.06180) with chunked prefill (Sarathi,
arXiv 2308.16369). One step: running sequences get one token each, then prompts are read in chunks out of what
`budget.py` leaves, and waiting sequences enter (`entering.py`) as long as tokens, places and blocks reach to them.

Nothing starves. Of those that have entered, the one of the lowest rank (first entry) never gives way, always advances
and ends; the others follow in turn (`preemption.py`). Of those that have not, each tenant's turn comes in proportion to
its weight (`fairness.py`), in a tenant's queue only so many can come before another (`queue.py`, `entering.py`), and
whoever's turn it is and who finds no room is not overtaken by those who would take that room.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from dataclasses import replace
from operator import attrgetter
from typing import NamedTuple

from pagemill.base.errors import CapacityError, IntegrityError, PagemillError
from pagemill.base.step import SequenceStep, StepPlan
from pagemill.cache.manager import CacheManager
from pagemill.engine.admission import EngineLimits
from pagemill.engine.backlog import Backlog
from pagemill.engine.budget import StepBudget
from pagemill.engine.deadlines import Deadlines
from pagemill.engine.entering import Choice, Entering
from pagemill.engine.fairness import Shares
from pagemill.engine.lateness import Pace
from pagemill.engine.preemption import choose_victim
from pagemill.engine.request import Sequence, tenant_of

_RANK = attrgetter("rank")
_NEW = tuple.__new__  # of a named tuple, without the Python function that fills in its defaults
Failed = tuple[tuple[Sequence, Exception], ...]


class Schedule(NamedTuple):
    """A step to run. rows: the sequences of `step.sequences`, in its order. num_decoding: the first of them, which have
    one token each; the others read prompts. failed: sequences that can never run on, already taken out, with the
    reason."""

    step: StepPlan
    rows: tuple[Sequence, ...]
    failed: Failed = ()
    num_decoding: int = 0


class Scheduler:
    """Waiting and running sequences over one cache. Mutated by `add`, `plan`, `ran` and `remove`. running: by rank.
    failed: taken out, and not told by any plan yet; where one raises, `take_failed` does."""

    __slots__ = (
        "_backlog", "_budget", "_cache", "_deadlines", "_entering", "_is_bounded", "_limits", "_next_rank", "_now_s",
        "_num_queued", "_num_waiting", "_pace", "failed", "num_expired", "num_preemptions", "num_tails_dropped",
        "running", "shares",
    )  # fmt: skip

    def __init__(self, limits: EngineLimits, cache: CacheManager) -> None:
        self._limits = limits
        self._cache = cache
        self.shares = Shares()
        self.running: list[Sequence] = []
        self._pace = Pace()
        self._entering = Entering(limits, cache, self.shares, self._pace, self.running)
        self._budget = StepBudget(limits.max_num_batched_tokens, limits.mixed_step_percent, limits.target_itl_s)
        self._is_bounded = limits.mixed_step_percent is not None or limits.target_itl_s is not None
        self._backlog = Backlog(limits.max_queued_requests)
        self._deadlines = Deadlines()
        self._next_rank = 1
        self._num_waiting = 0
        self._num_queued = 0
        self._now_s = 0.0
        self.num_preemptions = 0
        self.num_tails_dropped = 0
        self.num_expired = 0
        self.failed: list[tuple[Sequence, Exception]] = []

    @property
    def num_waiting(self) -> int:
        """Sequences that wait."""
        return self._num_waiting

    @property
    def num_queued(self) -> int:
        """Requests that have not begun."""
        return self._num_queued

    def check_room(self, tenant: str) -> None:
        """Raise QueueFullError unless one more request of the tenant may wait."""
        share = self.shares.active.get(tenant)
        num_own = 0 if share is None else share.num_queued
        self._backlog.check(tenant, num_own, self._num_queued, self._limits.max_num_seqs - len(self.running))

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        sequence.reads_history = sequence.request.params.reads_history
        share = self.shares.of(tenant_of(sequence))
        share.num_queued += sequence.first is None
        self._num_queued += sequence.first is None
        self._deadlines.add(sequence)
        self._wait(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out in whatever state, with its blocks. Removing a finished one does nothing."""
        if sequence.status == "finished":
            return
        share = self.shares.active[tenant_of(sequence)]
        if sequence.status == "running":
            self._leave(sequence)
            self._pace.ended(sequence, self._now_s)
            if sequence.first is None:
                self._backlog.finished(self._now_s, len(self.running))
        else:
            share.queue.remove(sequence)
            self._num_waiting -= 1
            if not sequence.rank and sequence.first is None:
                share.num_queued -= 1
                self._num_queued -= 1
        sequence.status = "finished"
        self._deadlines.forget(sequence)
        self._entering.changed()
        if share.is_idle:
            self.shares.rest(share)

    def plan(self, now_s: float) -> Schedule:
        """The next step: rows with their blocks taken. Nothing is computed until the cache is told so, therefore a
        plan that was not run is planned again.

        No more run than a step has tokens, so that each that decodes has its row.
        """
        self._now_s = now_s
        if self._is_bounded:
            self._budget.began(now_s if self.running else None)
        self._cache.advance(now_s)
        failed = self.failed
        if self._deadlines.num_live:
            for sequence, error in self._deadlines.due(now_s):
                self.num_expired += 1
                failed.append((sequence, error))
                self.remove(sequence)
                self._entering.expired(sequence)
        if self._cache.mode == "none":
            return self._plan_recompute(now_s, failed)
        if self._num_waiting and (displaced := self._entering.displaced(now_s)) is not None:
            self._send_back(displaced)
        rows: list[Sequence] = []
        steps: list[SequenceStep] = []
        prompts: list[Sequence] = []
        short = self._grow_running(failed, rows, steps, prompts)
        num_decoding = len(rows)
        if self._num_waiting or prompts:
            self._fill(rows, steps, prompts, failed, short=short)
        plan = _NEW(StepPlan, (tuple(steps), self._cache.moves()))
        return _NEW(Schedule, (plan, tuple(rows), self.take_failed(), num_decoding))

    def _fill(
        self,
        rows: list[Sequence],
        steps: list[SequenceStep],
        prompts: list[Sequence],
        failed: list[tuple[Sequence, Exception]],
        *,
        short: bool,
    ) -> None:
        """Beside the rows that decode, let sequences in and read prompts, as far as a step goes. short: of blocks."""
        num_decoding = len(rows)
        num_places = min(self._limits.max_num_seqs, len(self.running) + self._num_waiting)
        left = self._left(num_decoding, num_places, prompts)
        if self._num_waiting and left and not short:
            num_prompts = len(prompts)
            self._let_in(prompts, left, failed)
            if len(prompts) > num_prompts:
                left = min(left, self._left(num_decoding, num_places, prompts))
        if prompts and left:
            self._read_prompts(prompts, left, rows, steps)

    def ran(self, schedule: Schedule, num_tokens: int, seconds: float) -> None:
        """A step of so many tokens was computed and took so long: tenants are charged, and the budget learns."""
        num_decoding = schedule.num_decoding
        if self._is_bounded:
            prompts = schedule.step.sequences[num_decoding:]
            positions = sum([len(each.token_ids) * (each.start + len(each.token_ids) / 2) for each in prompts])
            self._budget.saw(num_decoding, num_tokens - num_decoding, seconds, positions)
        self._pace.saw(num_decoding, num_tokens - num_decoding, seconds)
        active = self.shares.active
        if len(active) == 1:
            for only in active.values():
                self.shares.charge(only, 0, num_decoding)
            return
        for sequence in schedule.rows[:num_decoding]:
            if (share := active.get(tenant_of(sequence))) is not None:
                self.shares.charge(share, 0, 1)

    def _plan_recompute(self, now_s: float, failed: list[tuple[Sequence, Exception]]) -> Schedule:
        """Mode none: every row is a whole history from position 0. The earliest always runs, whatever its length; the
        others where tokens and scratch blocks last. A row left out loses nothing, for there is nothing to lose."""
        cache = self._cache
        while self._num_waiting and len(self.running) < self._limits.max_num_seqs:
            self._enter(self.shares.waiting()[0].queue.first(1)[0], now_s)
        while self.running and cache.blocks_for(len(self.running[0].tokens)) > cache.num_blocks:
            failed.append(self._fail(self.running[0]))
        rows: list[Sequence] = []
        steps: list[SequenceStep] = []
        budget = self._limits.max_num_batched_tokens
        for sequence in self.running:
            num_tokens = len(sequence.tokens)
            if (rows and num_tokens > budget) or not cache.can_resize(sequence.seq_id, num_tokens):
                continue
            cache.resize(sequence.seq_id, num_tokens)
            budget -= self._add_chunk(sequence, num_tokens, rows, steps)
        return Schedule(StepPlan(tuple(steps)), tuple(rows), self.take_failed())

    def take_failed(self) -> Failed:
        """Who was taken out and is told now."""
        told = tuple(self.failed)
        self.failed.clear()
        return told

    def _grow_running(
        self,
        failed: list[tuple[Sequence, Exception]],
        rows: list[Sequence],
        steps: list[SequenceStep],
        prompts: list[Sequence],
    ) -> bool:
        """Blocks for the known tokens of each running sequence, by rank: those that decode get their rows, those that
        read are listed. Who finds no block waits in its place. Returns whether blocks were short for anybody, for other
        reasons than its own tenant's cap."""
        cache, running, short = self._cache, self.running, False
        index = 0
        while index < len(running):
            sequence = running[index]
            blocks, num_tokens = sequence.blocks, len(sequence.tokens)
            assert blocks is not None
            if blocks.committed == num_tokens:  # computed, but an interrupt lost the sample: once more
                fits = cache.can_resize(sequence.seq_id, num_tokens - 1)
                if fits:
                    cache.resize(sequence.seq_id, num_tokens - 1)
                    continue
            else:
                fits = cache.grow(blocks, num_tokens)
            if fits:
                if num_tokens - blocks.committed == 1:
                    rows.append(sequence)
                    steps.append(self._row(sequence, 1))
                else:
                    prompts.append(sequence)
                index += 1
            elif self._floor_error(sequence, num_tokens) is not None:
                failed.append(self._fail(sequence))
            elif not self._make_room(sequence, num_tokens):
                if self._is_first(sequence, num_tokens):
                    failed.append(self._fail(sequence))
                else:
                    short = short or not cache.is_capped(sequence.seq_id, num_tokens)
                    index += 1
        return short

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Have somebody give way so that `sequence` can have `num_tokens` positions; False where nobody can."""
        victim = choose_victim(sequence, num_tokens, self.running, self.shares, self._cache)
        if victim is None:
            return False
        if victim.num_kept:
            self.num_preemptions += 1
            self.num_tails_dropped += 1
            victim.sequence.num_preemptions += 1
            self._cache.resize(victim.sequence.seq_id, victim.num_kept)
        else:
            self._send_back(victim.sequence)
        return True

    def _is_first(self, sequence: Sequence, num_tokens: int) -> bool:
        """True where nobody before it will ever free what it needs, so that to wait would help nothing."""
        cache = self._cache
        if not cache.is_capped(sequence.seq_id, num_tokens):
            return self.running[0] is sequence
        return sequence is next(each for each in self.running if cache.same_account(each.seq_id, sequence.seq_id))

    def _send_back(self, sequence: Sequence) -> None:
        """Take the blocks of a running sequence; it comes first in its queue, with what it generated."""
        self.num_preemptions += 1
        sequence.num_preemptions += 1
        self._leave(sequence)
        self._wait(sequence)

    def restart(self, sequences: Iterable[Sequence]) -> None:
        """The cache was rebuilt and knows no sequence any more: `sequences`, all that are unfinished, wait to be
        computed anew. What was noted of any others is forgotten."""
        self.num_preemptions += len(self.running)
        self._entering.forget_hits()
        alive = list(sequences)
        for sequence in alive:
            sequence.num_preemptions += sequence.status == "running"
            sequence.status, sequence.blocks = "waiting", None
        self.renew(alive)

    def renew(self, sequences: Iterable[Sequence]) -> None:
        """Something went wrong half-way: queues, places, counts and deadlines are made anew of `sequences`, all that
        are unfinished. Raises IntegrityError where one that runs is not what the cache holds."""
        alive = list(sequences)
        self._deadlines, self._num_waiting, self._num_queued = Deadlines(), 0, 0
        self.running[:] = sorted([each for each in alive if each.status == "running"], key=_RANK)
        waiting: dict[str, list[Sequence]] = {}
        shares = {tenant_of(each): self.shares.of(tenant_of(each)) for each in alive}
        for share in self.shares.active.values():
            share.num_queued = share.num_running = 0
        for each in alive:
            share = shares[tenant_of(each)]
            if each.status == "running":
                if each.blocks is None or each.blocks is not self._cache.blocks_of(each.seq_id):
                    raise IntegrityError("a sequence that runs has other blocks than the KV cache says")
                share.num_running += 1
            else:
                waiting.setdefault(share.name, []).append(each)
            is_queued = not each.rank and each.first is None
            share.num_queued += is_queued
            self._num_queued += is_queued
            self._deadlines.add(each)
        for share in list(self.shares.active.values()):
            share.queue = share.queue.anew(waiting.get(share.name, ()))
            self._num_waiting += len(share.queue)
            if share.is_idle:
                self.shares.rest(share)
        self._entering.changed()

    def _wait(self, sequence: Sequence) -> None:
        sequence.status = "waiting"
        self.shares.active[tenant_of(sequence)].queue.add(sequence)
        self._num_waiting += 1
        self._entering.changed()

    def _leave(self, sequence: Sequence) -> None:
        self._cache.close(sequence.seq_id)
        self.running.remove(sequence)
        sequence.blocks = None
        self.shares.active[tenant_of(sequence)].num_running -= 1

    def _floor_error(self, sequence: Sequence, num_tokens: int) -> CapacityError | None:
        """The error of so many tokens where other tenants' floors deny them for ever."""
        shared, count = self._cache.shared, self._cache.blocks_for(num_tokens)
        return None if shared is None else shared.floor_error(count, sequence.request.cache)

    def _own_pins_error(self, sequence: Sequence, need: int) -> CapacityError | None:
        """The error of `need` blocks where its own tenant's cap denies them and that tenant's pins are in the way."""
        shared, options, tokens = self._cache.shared, sequence.request.cache, sequence.tokens
        if shared is None:
            return None
        account = shared.account_of(options)
        if sequence.blocks is not None:
            is_capped = self._cache.is_capped(sequence.seq_id, len(tokens))
        else:
            is_capped = account.shortage(shared.entry(options, tokens, len(tokens)).num_new) is not None
        return account.beside_pins(need) if is_capped else None

    def _fail(self, sequence: Sequence) -> tuple[Sequence, PagemillError]:
        cache, num_tokens = self._cache, len(sequence.tokens)
        need = max(cache.blocks_for(num_tokens), cache.blocks_to_open(num_tokens, self._limits.max_model_len))
        error = (
            cache.cap_error(num_tokens, sequence.request.cache)
            or self._floor_error(sequence, num_tokens)
            or self._own_pins_error(sequence, need)
            or cache.pin_error(need)
            or CapacityError(
                f"the sequence has {num_tokens:,} tokens and needs {need:,} blocks of the KV cache, which has "
                f"{cache.num_blocks:,} of {cache.block_size} tokens in all; lower max_tokens or raise "
                f"kv_cache_memory_bytes"
            )
        )
        self.remove(sequence)
        return sequence, error

    def _enter(self, sequence: Sequence, now_s: float) -> None:
        cache, share = self._cache, self.shares.active[tenant_of(sequence)]
        first, longest = sequence.first, self._limits.max_model_len
        head = sequence if first is None else first
        if first is not None and first.status == "running":
            cache.publish_tail(first.seq_id)
        lookup = cache.open(
            sequence.seq_id, len(sequence.tokens), longest, sequence.tokens, sequence.request.cache,
            head.has_begun,
        )  # fmt: skip
        head.has_begun = True
        self._entering.enters(share, sequence)
        share.queue.remove(sequence)
        self._num_waiting -= 1
        if not sequence.rank:
            sequence.lookup = lookup
            self.shares.charge(share, len(sequence.tokens) - lookup.num_hit, 0)
            sequence.rank = self._next_rank
            self._next_rank += 1
            sequence.marks = replace(sequence.marks, scheduled_s=now_s)
            share.num_queued -= sequence.first is None
            self._num_queued -= sequence.first is None
        insort(self.running, sequence, key=lambda each: each.rank)
        share.num_running += 1
        sequence.status = "running"
        sequence.blocks = cache.blocks_of(sequence.seq_id)

    def _let_in(self, prompts: list[Sequence], left: int, failed: list[tuple[Sequence, Exception]]) -> None:
        """Waiting sequences become prompts to be read as long as `left` tokens reach to them in this step."""
        most = min(self._limits.max_num_seqs, self._limits.max_num_batched_tokens)
        while len(self.running) < most and (choice := self._entering.choose(prompts, self._now_s)) is not None:
            if choice.hopeless:
                failed.append(self._fail(choice.sequence))
            elif self._reaches(choice, prompts, left):
                self._enter(choice.sequence, self._now_s)
                prompts.append(choice.sequence)
            else:
                break

    def _reaches(self, choice: Choice, prompts: list[Sequence], left: int) -> bool:
        """True where `_read_prompts` would read something of the prompt of whoever enters."""
        if not prompts:
            return True
        front, count = self._in_turn(prompts)[0], choice.num_unread
        mine, its = tenant_of(choice.sequence), tenant_of(front)
        if mine != its and self.shares.active[mine].service < self.shares.active[its].service:
            return True
        unread = [_num_unread(each) for each in prompts]
        if count < _num_unread(front) and sum(each for each in unread if each <= count) < left // 2:
            return True
        return sum(unread) < left

    def _left(self, num_decoding: int, num_places: int, prompts: list[Sequence]) -> int:
        """Tokens of a step for prompts, of which that one costs most whose turn it is."""
        front = self._in_turn(prompts)[0].blocks if prompts else None
        position = 0 if front is None else front.committed
        return self._budget.for_prompts(num_decoding, num_places - num_decoding, position)

    def _in_turn(self, prompts: list[Sequence]) -> list[Sequence]:
        """Prompts by whose turn it is, and by rank within a tenant."""
        active = self.shares.active
        if len(prompts) < 2 or len(active) < 2:
            return prompts
        return sorted(prompts, key=lambda each: (active[tenant_of(each)].service, each.rank))

    def _read_prompts(
        self, prompts: list[Sequence], left: int, rows: list[Sequence], steps: list[SequenceStep]
    ) -> None:
        """Rows of prompts out of `left` tokens. Whoever's turn it is has at least half of them; the other half goes to
        those of whom less is left to read, so that a long prompt does not hold up all short ones."""
        front, *rest = self._in_turn(prompts)
        counts: dict[int, int] = {}
        if rest and (most := _num_unread(front)) > left - left // 2:
            half = left // 2
            for each in sorted(rest, key=_num_unread):
                if not half or _num_unread(each) >= most:
                    break
                counts[each.seq_id] = count = min(_num_unread(each), half)
                half, left = half - count, left - count
        for each in (front, *rest):
            taken = counts.get(each.seq_id, 0)
            count = min(_num_unread(each) - taken, left)
            left -= count
            if taken + count:
                self._add_chunk(each, taken + count, rows, steps)

    def _add_chunk(self, sequence: Sequence, most: int, rows: list[Sequence], steps: list[SequenceStep]) -> int:
        """Append the row of the next `most` tokens or fewer; returns their number."""
        count = min(most, _num_unread(sequence))
        rows.append(sequence)
        steps.append(self._row(sequence, count))
        return count

    def _row(self, sequence: Sequence, count: int) -> SequenceStep:
        request, tokens, blocks = sequence.request, sequence.tokens, sequence.blocks
        assert blocks is not None
        params, start, num_tokens = request.params, blocks.committed, len(tokens)
        end = start + count
        num_generated = num_tokens - len(request.prompt_token_ids)
        return _NEW(
            SequenceStep,
            (
                sequence.seq_id,
                (tokens[start],) if count == 1 else tokens[start:end],
                start,
                blocks.table,
                end == num_tokens,
                params,
                request.seed,
                sequence.choice,
                num_generated,
                request.stop_token_ids if num_generated < params.min_tokens else (),
                tokens if sequence.reads_history else (),
                self._cache.window_tables(blocks, end) if blocks.first_read else (),
            ),
        )


def _num_unread(sequence: Sequence) -> int:
    """Known tokens that are not computed."""
    assert sequence.blocks is not None
    return len(sequence.tokens) - sequence.blocks.committed
