"""Who runs in the next step, and how many tokens of each. Owns the order of waiting and running sequences.

Continuous batching (Orca, OSDI 2022) over a paged cache (vLLM, arXiv 2309.06180) with chunked prefill (Sarathi,
arXiv 2308.16369). First come, first served: at any moment every running sequence came before every waiting one, and
blocks or tokens that run short are denied to the latest. So the earliest always advances, and everyone becomes the
earliest: nothing starves and nothing livelocks.

One step: running sequences get one token each, then prompts are read in chunks out of what is left of
`max_num_batched_tokens`, then waiting sequences enter while tokens, places and blocks last.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from pagemill.base.errors import CapacityError
from pagemill.base.step import SequenceStep, StepPlan
from pagemill.cache.manager import CacheManager
from pagemill.engine.admission import EngineLimits
from pagemill.engine.request import Sequence


@dataclass(frozen=True, slots=True)
class Schedule:
    """A step to run. rows: the sequences of `step.sequences`, in its order. failed: sequences that can never run on,
    already taken out, with the reason."""

    step: StepPlan
    rows: tuple[Sequence, ...]
    failed: tuple[tuple[Sequence, CapacityError], ...] = ()


class Scheduler:
    """Waiting and running sequences over one cache. Mutated by `add`, `plan` and `remove`."""

    __slots__ = ("_cache", "_limits", "num_preemptions", "running", "waiting")

    def __init__(self, limits: EngineLimits, cache: CacheManager) -> None:
        self._limits = limits
        self._cache = cache
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence behind all others."""
        sequence.status = "waiting"
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out in whatever state, with its blocks. Removing a finished one does nothing."""
        if sequence.status == "running":
            self.running.remove(sequence)
            self._cache.close(sequence.seq_id)
        elif sequence.status == "waiting":
            self.waiting.remove(sequence)
        sequence.status = "finished"

    def plan(self, now_s: float) -> Schedule:
        """The next step: rows with their blocks taken. Nothing is computed until the cache is told so, therefore a
        plan that was not run is planned again.

        Nobody enters unless each that runs has a row, so that those who decode never outnumber the budget.
        """
        self._cache.advance(now_s)
        if self._cache.mode == "none":
            return self._plan_recompute(now_s)
        failed: list[tuple[Sequence, CapacityError]] = []
        self._grow_running(failed)
        rows: list[Sequence] = []
        steps: list[SequenceStep] = []
        prompts: list[Sequence] = []
        for sequence in self.running:
            if self._num_uncomputed(sequence) == 1:
                rows.append(sequence)
                steps.append(self._row(sequence, 1))
            else:
                prompts.append(sequence)
        budget = self._limits.max_num_batched_tokens - len(rows)
        for sequence in prompts:
            if not budget:
                break
            budget -= self._add_chunk(sequence, budget, rows, steps)
        while budget and self._can_admit(failed):
            budget -= self._add_chunk(self._admit(now_s), budget, rows, steps)
        return Schedule(StepPlan(tuple(steps), self._cache.moves()), tuple(rows), tuple(failed))

    def _plan_recompute(self, now_s: float) -> Schedule:
        """Mode none: every row is a whole history from position 0. The earliest always runs, whatever its length; the
        others where tokens and scratch blocks last. A row left out loses nothing, for there is nothing to lose."""
        cache = self._cache
        while self.waiting and len(self.running) < self._limits.max_num_seqs:
            self._admit(now_s)
        failed = []
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
        return Schedule(StepPlan(tuple(steps)), tuple(rows), tuple(failed))

    def _grow_running(self, failed: list[tuple[Sequence, CapacityError]]) -> None:
        """Blocks for the newest token of each running sequence, the latest giving way to the earliest: the latest of
        all where blocks are short, of its own tenant where that tenant's cap is reached.

        Whoever gives way needs at least the blocks it had, one of which is taken now: it cannot enter again at once.
        """
        cache, running = self._cache, self.running
        index = 0
        while index < len(running):
            sequence = running[index]
            seq_id, num_tokens = sequence.seq_id, len(sequence.tokens)
            if cache.num_committed(seq_id) == num_tokens:  # computed, but an interrupt lost the sample: once more
                if not cache.can_resize(seq_id, num_tokens - 1):
                    self._preempt(self._latest(sequence, num_tokens - 1))
                    continue
                cache.resize(seq_id, num_tokens - 1)
            if cache.can_resize(seq_id, num_tokens):
                cache.resize(seq_id, num_tokens)
                index += 1
            elif (latest := self._latest(sequence, num_tokens)) is sequence and self._is_alone(sequence, num_tokens):
                failed.append(self._fail(sequence))
            else:
                self._preempt(latest)

    def _latest(self, sequence: Sequence, num_tokens: int) -> Sequence:
        """Who gives way so that `sequence` can grow: nobody of another tenant for what its own tenant's cap denies."""
        cache = self._cache
        if not cache.is_capped(sequence.seq_id, num_tokens):
            return self.running[-1]
        return next(each for each in reversed(self.running) if cache.same_account(each.seq_id, sequence.seq_id))

    def _is_alone(self, sequence: Sequence, num_tokens: int) -> bool:
        """True where it is the only one that could give way, so that to wait would help nothing."""
        cache = self._cache
        if not cache.is_capped(sequence.seq_id, num_tokens):
            return len(self.running) == 1
        return all(each is sequence or not cache.same_account(each.seq_id, sequence.seq_id) for each in self.running)

    def _preempt(self, sequence: Sequence) -> None:
        """Take the blocks of a running sequence; it waits in front of all, to be recomputed with what it generated."""
        self.running.remove(sequence)
        self._cache.close(sequence.seq_id)
        sequence.status = "waiting"
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(sequence)

    def _fail(self, sequence: Sequence) -> tuple[Sequence, CapacityError]:
        cache, num_tokens = self._cache, len(sequence.tokens)
        need = max(cache.blocks_for(num_tokens), cache.blocks_to_open(num_tokens, self._limits.max_model_len))
        error = (
            self._cache.cap_error(num_tokens, sequence.request.cache)
            or self._cache.pin_error(need)
            or CapacityError(
                f"the sequence has {num_tokens:,} tokens and needs {need:,} blocks of the KV cache, which has "
                f"{cache.num_blocks:,} of {cache.block_size} tokens in all; lower max_tokens or raise "
                f"kv_cache_memory_bytes"
            )
        )
        self.remove(sequence)
        return sequence, error

    def _can_admit(self, failed: list[tuple[Sequence, CapacityError]]) -> bool:
        """The first in the queue has a place and its blocks, and each sequence that runs can still grow by a block:
        without this reserve the newcomer would soon be sent back and its prefill lost. Whoever does not fit although
        nobody runs never will, and fails."""
        while self.waiting and len(self.running) < self._limits.max_num_seqs:
            head = self.waiting[0]
            if self._awaits_prompt(head):
                return False
            spare = self._num_to_grow(head) + sum(map(self._num_to_grow, self.running)) if self.running else 0
            longest, options = self._limits.max_model_len, head.request.cache
            if self._cache.can_open(len(head.tokens), longest, spare, head.tokens, options):
                return True
            if self.running:
                return False
            failed.append(self._fail(head))
        return False

    def _awaits_prompt(self, sequence: Sequence) -> bool:
        """True for a further choice while the first is reading the prompt that both will share."""
        first = sequence.first
        if first is None or self._cache.shared is None or sequence.request.cache.bypass or first.status != "running":
            return False
        return self._cache.num_committed(first.seq_id) < sequence.request.num_prompt_tokens

    def _num_to_grow(self, sequence: Sequence) -> int:
        """1 where the sequence may need more blocks than its known tokens do, else 0."""
        if self._cache.mode == "contiguous":
            return 0
        return int(self._cache.blocks_for(sequence.request.longest) > self._cache.blocks_for(len(sequence.tokens)))

    def _admit(self, now_s: float) -> Sequence:
        sequence, cache = self.waiting[0], self._cache
        first, longest = sequence.first, self._limits.max_model_len
        if first is not None and first.status == "running":
            cache.publish_tail(first.seq_id)
        lookup = cache.open(sequence.seq_id, len(sequence.tokens), longest, sequence.tokens, sequence.request.cache)
        if sequence.lookup is None:
            sequence.lookup = lookup
        self.waiting.popleft()
        self.running.append(sequence)
        sequence.status = "running"
        if sequence.marks.scheduled_s is None:
            sequence.marks = replace(sequence.marks, scheduled_s=now_s)
        return sequence

    def _num_uncomputed(self, sequence: Sequence) -> int:
        return len(sequence.tokens) - self._cache.num_committed(sequence.seq_id)

    def _add_chunk(self, sequence: Sequence, most: int, rows: list[Sequence], steps: list[SequenceStep]) -> int:
        """Append the row of the next `most` tokens or fewer; returns their number."""
        count = min(most, self._num_uncomputed(sequence))
        rows.append(sequence)
        steps.append(self._row(sequence, count))
        return count

    def _row(self, sequence: Sequence, count: int) -> SequenceStep:
        request, tokens = sequence.request, sequence.tokens
        start = self._cache.num_committed(sequence.seq_id)
        num_generated = len(tokens) - len(request.prompt_token_ids)
        return SequenceStep(
            seq_id=sequence.seq_id,
            token_ids=tokens[start : start + count],
            start=start,
            block_table=self._cache.block_table(sequence.seq_id),
            sample=start + count == len(tokens),
            params=request.params,
            seed=request.seed,
            choice=sequence.choice,
            num_generated=num_generated,
            forbid=request.stop_token_ids if num_generated < request.params.min_tokens else (),
        )
