"""The loop: plan, run, commit, answer. Owns the requests that are not finished; decides nothing itself.

One thread owns an engine. Whatever fails, fails as the last delta of the requests concerned, and the loop goes on: an
exception in work for one ends that one. Where it may have left something half-way, what is noted of the others is made
anew and what the cache holds is examined; only a cache that is found to contradict itself is dropped (`_recover`).
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Collection, Iterable
from collections.abc import Sequence as Ordered
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from pagemill.base.errors import IntegrityError, RequestError
from pagemill.base.params import DEFAULT_CACHE_OPTIONS, CacheOptions, SamplingParams
from pagemill.base.step import StepPlan, StepResult
from pagemill.base.transfer import NO_MOVES, Moves
from pagemill.cache.entry import CacheStats
from pagemill.cache.manager import CacheManager
from pagemill.engine.admission import Admission, EngineLimits, derive_seed
from pagemill.engine.output import Delta, FinishReason, Output, check_answers
from pagemill.engine.ports import Clock, Decode, Executor
from pagemill.engine.receipt import PrefillRate, Receipt
from pagemill.engine.request import Marks, Request, Sequence
from pagemill.engine.scheduler import Schedule, Scheduler
from pagemill.engine.suspects import suspect_of

_LOG: Final = logging.getLogger(__name__)
_MOST_RECOVERIES: Final = 3
_MOST_FAULTS: Final = 1  # recoveries that began with the same sequence


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts of an engine: now (running, waiting, cache) and since its start (steps, tokens computed, preemptions; of
    these, those that dropped no more than a tail; sequences whose deadline passed)."""

    num_running: int
    num_waiting: int
    num_steps: int
    num_computed_tokens: int
    num_preemptions: int
    cache: CacheStats
    num_tails_dropped: int = 0
    num_expired: int = 0


class Engine:
    """Continuous batching over one executor and one cache. Mutated by `add_request`, `step` and `abort`.

    decode: token ids and skip_special_tokens to text. seed: from which requests without a seed get theirs.
    on_stage: called at the end of "schedule", "commit" and "deltas" with that name, for profiles; None costs nothing.
    """

    __slots__ = (
        "_admission", "_cache", "_clock", "_damage", "_executor", "_next_seq_id", "_num_computed_tokens",
        "_num_recoveries", "_num_requests", "_num_steps", "_output", "_rate", "_scheduler", "_seed", "_unfinished",
        "on_stage",
    )  # fmt: skip

    def __init__(
        self,
        executor: Executor,
        cache: CacheManager,
        limits: EngineLimits,
        decode: Decode,
        clock: Clock,
        seed: int = 0,
    ) -> None:
        self._executor = executor
        self._cache = cache
        self._clock = clock
        self._seed = seed
        self._admission = Admission(limits, cache)
        self._scheduler = Scheduler(limits, cache)
        self._output = Output(decode)
        self._rate = PrefillRate()
        self._unfinished: dict[str, list[Sequence]] = {}
        self._num_requests = 0
        self._next_seq_id = 0
        self._num_steps = 0
        self._num_computed_tokens = 0
        self._num_recoveries = 0  # since a token was told
        self._damage: Exception | None = None  # raised where a request came or ended; the next step mends it
        self.on_stage: Callable[[str], None] | None = None

    @property
    def limits(self) -> EngineLimits:
        """What requests are held to."""
        return self._admission.limits

    @property
    def has_unfinished(self) -> bool:
        """True while a request waits or runs: `step` has something to do."""
        return bool(self._unfinished)

    @property
    def num_computed_tokens(self) -> int:
        """Tokens computed since the start."""
        return self._num_computed_tokens

    def stats(self) -> EngineStats:
        """Counts now, in O(1); a pin may have ended since the last step."""
        self.advance_clock()
        scheduler = self._scheduler
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=scheduler.num_waiting,
            num_steps=self._num_steps,
            num_computed_tokens=self._num_computed_tokens,
            num_preemptions=scheduler.num_preemptions,
            cache=self._cache.stats(),
            num_tails_dropped=scheduler.num_tails_dropped,
            num_expired=scheduler.num_expired,
        )

    @property
    def cache(self) -> CacheManager:
        """The KV cache, whose thread is the engine's."""
        return self._cache

    def check_request(
        self, prompt_token_ids: Ordered[int], params: SamplingParams, cache: CacheOptions = DEFAULT_CACHE_OPTIONS
    ) -> None:
        """Raise what `add_request` would raise for this prompt (RequestError, CapacityError), and change nothing."""
        self._admission.admit("", prompt_token_ids, params, 0, 0.0, cache)

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Ordered[int],
        params: SamplingParams,
        arrival_s: float | None = None,
        cache: CacheOptions = DEFAULT_CACHE_OPTIONS,
    ) -> Request:
        """Queue a request; its answer comes out of `step` as deltas, `params.n` choices of them.

        arrival_s: on the engine's clock, None for now. cache: whose blocks it may share, and how. Raises RequestError
        for a wrong request or an id in use, CapacityError for a prompt that no emptying of the cache would let in, and
        QueueFullError where too many wait; the engine is unchanged then.
        """
        if request_id in self._unfinished:
            raise RequestError(f"request id {request_id!r} is in use; give each request its own", status=409)
        arrival_s = self._clock.now() if arrival_s is None else arrival_s
        seed = derive_seed(self._seed, self._num_requests)
        request = self._admission.admit(request_id, prompt_token_ids, params, seed, arrival_s, cache)
        self._scheduler.check_room(cache.tenant)
        sequences = [self._sequence(request, choice) for choice in range(params.n)]
        for sequence in sequences[1:]:
            sequence.first = sequences[0]
        self._num_requests += 1
        self._unfinished[request_id] = sequences
        try:
            for sequence in sequences:
                self._output.open(sequence)
                self._scheduler.add(sequence)
        except Exception as error:
            for sequence in sequences:
                self._drop(sequence, error)
            self._rest()
            raise
        return request

    def abort(self, request_id: str) -> list[Delta]:
        """End a request in whatever state and free its blocks. Returns the last delta of each of its open choices;
        none where the request is unknown or has just finished."""
        deltas = self._end(self._unfinished.get(request_id, ()), "abort")
        self._rest()
        return deltas

    def discard(self, request_id: str, error: Exception) -> list[Delta]:
        """End a request by force, where `abort` raised the error."""
        sequences = list(self._unfinished.get(request_id, ()))
        for sequence in sequences:
            self._drop(sequence, error)
        self._rest()
        return [_broken(sequence, error) for sequence in sequences]

    def _rest(self) -> None:
        """Where nothing is unfinished, nobody waits for a step: what that would mend and wipe is done now."""
        if self._unfinished:
            return
        if self._damage is not None:
            self._mend(self._damage)
        self._settle_idle()

    def grant(self, tenant: str, weight: float = 1.0, priority: int = 0) -> None:
        """A tenant's part of the engine beside other tenants, from now on (`Shares.grant`). Raises ConfigError."""
        self._scheduler.shares.grant(tenant, weight, priority)

    def advance_clock(self) -> None:
        """Let leases and priorities end whose time is over, as each step does: before asking anything of the cache."""
        self._cache.advance(self._clock.now())

    def settle(self) -> None:
        """Make the moves that wait, such as wipes of dropped blocks, without a step. Costs nothing where none wait."""
        for _ in range(2):  # a copy may be the last to hold what a purge dropped
            if moves := self._cache.moves():
                self._executor.run(StepPlan((), moves))
                self._cache.moved(moves)

    def _settle_idle(self) -> None:
        """The same where nobody can be told of a failure: moves that fail wait for the next step, which makes them
        before their blocks are used."""
        with suppress(Exception):
            self.settle()

    def resize_cache(self, num_blocks: int) -> None:
        """Have a KV cache of so many blocks, sequences alive: those beyond a smaller size are copied to where room is.

        Raises CapacityError where sequences and pins use more or memory is short, and ConfigError where tenants' floors
        need more. The cache keeps its size then, and no sequence loses anything; texts that were evicted to make room
        stay evicted.
        """
        self.advance_clock()
        self.settle()
        if num_blocks > self._cache.num_blocks:
            self._executor.resize(num_blocks)
            self._cache.set_num_blocks(num_blocks)
            return
        before = self._cache.num_blocks
        moves = self._cache.vacate(num_blocks)
        try:
            if moves:
                self._executor.run(StepPlan((), moves))
            self._cache.moved(Moves(moves.wipes))
            self._cache.relocate()
            self._executor.resize(num_blocks)
        except BaseException:
            self._cache.set_num_blocks(before)
            raise
        self._cache.set_num_blocks(num_blocks)
        self.settle()

    def step(self) -> list[Delta]:
        """Run one step. Returns what it added, in the plan's order; possibly nothing, for a chunk of a prompt."""
        deltas = self._step() if self._damage is None else self._mend(self._damage) + self._step()
        if self._damage is not None:
            deltas += self._mend(self._damage)
        if not self._unfinished:
            self._settle_idle()
        return deltas

    def _step(self) -> list[Delta]:
        begin_s = self._clock.now()
        scheduler = self._scheduler
        try:
            self._cache.check()
            schedule = scheduler.plan(begin_s)
        except Exception as error:
            return self._unplanned(error)
        deltas: list[Delta] = []
        for sequence, failure in schedule.failed:
            deltas += self._end([sequence], "error", failure)
        if self.on_stage is not None:
            self.on_stage("schedule")
        if not schedule.rows:
            self._settle_idle()
            return deltas
        self._num_steps += 1
        try:
            result = self._executor.run(schedule.step)
            check_answers(schedule.step.sequences, result)
        except Exception as error:
            return deltas + self._fail(schedule.rows, error)
        try:
            if (moves := schedule.step.moves) is not NO_MOVES:
                self._cache.moved(moves)
            num_tokens, suspects = self._commit(schedule, result)
        except Exception as error:
            return deltas + self._recover(error)
        if suspects:
            deltas += self._part_with(*suspects)
            if not scheduler.running:  # all that ran is to be computed again
                return deltas
        if result.samples:
            self._num_recoveries = 0
        if self.on_stage is not None:
            self.on_stage("commit")
        end_s = self._clock.now()
        seconds = end_s - begin_s
        if schedule.num_decoding < len(schedule.rows):
            self._rate.saw(schedule.step, seconds)
        try:
            scheduler.ran(schedule, num_tokens, seconds)
        except Exception as error:  # tokens that a tenant is not charged for
            _LOG.error("a step is not counted: %s", type(error).__name__, exc_info=error)
        deltas += self._deltas(schedule, result, end_s)
        if self.on_stage is not None:
            self.on_stage("deltas")
        return deltas

    def _unplanned(self, error: Exception) -> list[Delta]:
        """No step could be planned: whoever it could not be planned for ends, and the next step is for the others."""
        scheduler, deltas = self._scheduler, list[Delta]()
        suspect = suspect_of(error, self._alive)
        for sequence, failure in scheduler.take_failed():
            deltas += self._end([sequence], "error", failure)
        return deltas + (self._recover(error) if suspect is None else self._part_with((suspect, error)))

    @property
    def _alive(self) -> list[Sequence]:
        """Sequences that are unfinished."""
        return [each for request in self._unfinished.values() for each in request]

    def _part_with(self, *suspects: tuple[Sequence, Exception]) -> list[Delta]:
        """Something went wrong at these sequences. They end by it, if all is sound without them. Where it is not, or
        what went wrong is that the cache contradicts itself, they are not to blame and computed again with the rest."""
        errors = {sequence.seq_id: error for sequence, error in suspects}
        error = next((each for each in errors.values() if isinstance(each, IntegrityError)), None)
        if error is None and self._is_sound_without(errors):
            deltas = []
            for sequence in [each for each in self._alive if each.seq_id in errors]:
                failure = errors[sequence.seq_id]
                _LOG.error("a request ends by an error: %s", type(failure).__name__, exc_info=failure)
                deltas += self._end([sequence], "error", failure)
            return deltas
        for sequence, _ in suspects:
            sequence.num_faults += 1
        return self._recover(error or suspects[0][1])

    def _is_sound_without(self, seq_ids: Collection[int]) -> bool:
        """Whether what is noted of all other sequences, made anew, and what the cache holds of them fit together."""
        others = [each for each in self._alive if each.seq_id not in seq_ids]
        try:
            self._cache.keep_open({each.seq_id for each in others if each.status == "running"})
            self._scheduler.renew(others)
            self._cache.examine()
        except Exception as error:
            _LOG.error("what an error left is not sound: %s", type(error).__name__, exc_info=error)
            return False
        for sequence in self._alive:
            if sequence.seq_id in seq_ids:
                sequence.status = "finished"
        return True

    def _mend(self, error: Exception) -> list[Delta]:
        """A request has ended by an error that may have left something half-way."""
        self._damage = None
        self._output.keep(self._alive)
        return [] if not isinstance(error, IntegrityError) and self._is_sound_without(()) else self._recover(error)

    def _recover(self, error: Exception) -> list[Delta]:
        """The control plane contradicts itself. Nothing that the cache holds is trusted any more: all of it is dropped
        and wiped, and what runs is computed again, to the same tokens. A sequence at which that begins again fails;
        where no token comes of it after several times, all that is unfinished does."""
        self._num_recoveries += 1
        _LOG.error("the KV cache is dropped and computed again: %s", type(error).__name__, exc_info=error)
        self._damage = None
        self._cache.rebuild()
        sequences = self._alive
        self._output.keep(sequences)
        self._scheduler.restart(each for each in sequences if each.status != "finished")
        hopeless = self._num_recoveries > _MOST_RECOVERIES
        lost = [each for each in sequences if hopeless or each.status == "finished" or each.num_faults > _MOST_FAULTS]
        return self._end(lost, "error", error)

    def _commit(self, schedule: Schedule, result: StepResult) -> tuple[int, list[tuple[Sequence, Exception]]]:
        """Tell the cache what was computed. Returns the number of tokens, and at whom it went wrong by what."""
        commit = self._cache.commit
        failed = {failure.seq_id for failure in result.failures} if result.failures else ()
        num_tokens = 0
        rows, suspects = schedule.rows, []
        for index, step in enumerate(schedule.step.sequences):
            count = len(step.token_ids)
            num_tokens += count
            if step.seq_id in failed:  # what a row wrote that came to nothing is not to be found by others
                continue
            try:
                commit(step.seq_id, step.start + count)
            except Exception as error:
                suspects.append((rows[index], error))
        self._num_computed_tokens += num_tokens
        return num_tokens, suspects

    def _deltas(self, schedule: Schedule, result: StepResult, now_s: float) -> list[Delta]:
        """What each sampled row tells. A row without a token, or whose text cannot be made, fails its own request."""
        deltas: list[Delta] = []
        rows, samples, num_told = schedule.rows, result.samples, 0
        failures = {each.seq_id: each for each in result.failures} if result.failures else {}
        make_delta = self._output.delta
        for index, step in enumerate(schedule.step.sequences):
            sequence = rows[index]
            if failures and sequence.seq_id in failures:
                failure = failures[sequence.seq_id]
                deltas += self._fail([sequence], RequestError(failure.reason, status=500, param=failure.param))
                continue
            if not step.sample:
                continue
            sample = samples[num_told]
            num_told += 1
            if sequence.status == "finished":  # a choice of a request that has failed in this loop
                continue
            try:
                delta = make_delta(sequence, sample, step.num_generated + 1, now_s)
                if delta.finish_reason is not None:
                    delta = self._with_receipt(sequence, delta)
            except Exception as error:
                deltas += self._fail([sequence], error)
                continue
            deltas.append(delta)
            if delta.finish_reason is not None:
                try:
                    self._forget(sequence)
                except Exception as error:
                    self._drop(sequence, error)
        return deltas

    def _fail(self, sequences: Iterable[Sequence], error: Exception) -> list[Delta]:
        """End every choice of the requests of `sequences` with the error."""
        deltas = []
        for request_id in dict.fromkeys(sequence.request.request_id for sequence in sequences):
            deltas += self._end(self._unfinished.get(request_id, ()), "error", error)
        return deltas

    def _end(self, sequences: Iterable[Sequence], reason: FinishReason, error: Exception | None = None) -> list[Delta]:
        """Last deltas of sequences, which are forgotten. One whose last delta cannot be made ends with an error."""
        deltas = []
        now_s = self._clock.now()
        for sequence in list(sequences):
            try:
                last = self._with_receipt(sequence, self._output.ending(sequence, reason, now_s, error))
            except Exception as failure:
                _LOG.error("a request ends without its last text: %s", type(failure).__name__, exc_info=failure)
                last = _broken(sequence, error or failure)
            deltas.append(last)
            try:
                self._forget(sequence)
            except Exception as failure:
                self._drop(sequence, failure)
        return deltas

    def _with_receipt(self, sequence: Sequence, delta: Delta) -> Delta:
        """The last delta of a choice, saying what the cache did for it, where that can be told."""
        try:
            receipt = self.receipt_of(sequence)
        except Exception as error:
            _LOG.error("a request ends without its receipt: %s", type(error).__name__, exc_info=error)
            return delta
        if receipt is None:
            return delta
        return delta._replace(num_cached_tokens=receipt.num_cached_tokens, receipt=receipt)

    def receipt_of(self, sequence: Sequence) -> Receipt | None:
        """What the cache did for a sequence; None where it shares nothing or has not entered."""
        if sequence.lookup is None or self._cache.shared is None:
            return None
        return self._rate.receipt(sequence.request.num_prompt_tokens, sequence.lookup)

    def _forget(self, sequence: Sequence) -> None:
        """Blocks, text and place of a sequence that has ended; its request's when it was the last choice."""
        self._strike(sequence)
        self._scheduler.remove(sequence)
        self._output.close(sequence)
        sequence.status = "finished"

    def _drop(self, sequence: Sequence, error: Exception) -> None:
        """The same where that raised the error: what it left is mended at the next step."""
        _LOG.error("a request could not be forgotten: %s", type(error).__name__, exc_info=error)
        self._strike(sequence)
        self._damage = error
        sequence.status = "finished"

    def _strike(self, sequence: Sequence) -> None:
        """It is no longer unfinished."""
        choices = self._unfinished.get(sequence.request.request_id, [])
        if sequence in choices:
            choices.remove(sequence)
        if not choices:
            self._unfinished.pop(sequence.request.request_id, None)

    def _sequence(self, request: Request, choice: int) -> Sequence:
        self._next_seq_id += 1
        tokens = array("i", request.prompt_token_ids)
        return Sequence(self._next_seq_id, request, choice, tokens, Marks(request.arrival_s))


def _broken(sequence: Sequence, error: Exception) -> Delta:
    """The last delta of a sequence of which nothing can be told but the error."""
    name = sequence.request.request_id
    return Delta(name, sequence.choice, (), "", sequence.marks, finish_reason="error", error=error)
