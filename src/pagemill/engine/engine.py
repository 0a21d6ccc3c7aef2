"""The loop: plan, run, commit, answer. Owns the requests that are not finished; decides nothing itself.

One thread owns an engine. Whatever fails, fails as the last delta of the requests concerned, and the loop goes on.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass

from pagemill.base.errors import RequestError
from pagemill.base.params import SamplingParams
from pagemill.base.step import StepResult
from pagemill.cache.manager import CacheManager, CacheStats
from pagemill.engine.admission import Admission, EngineLimits, derive_seed
from pagemill.engine.output import Delta, FinishReason, Output, check_answers
from pagemill.engine.ports import Clock, Decode, Executor
from pagemill.engine.request import Marks, Request, Sequence
from pagemill.engine.scheduler import Schedule, Scheduler


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts of an engine: now (running, waiting, cache) and since its start (steps, tokens computed, preemptions)."""

    num_running: int
    num_waiting: int
    num_steps: int
    num_computed_tokens: int
    num_preemptions: int
    cache: CacheStats


class Engine:
    """Continuous batching over one executor and one cache. Mutated by `add_request`, `step` and `abort`.

    decode: token ids and skip_special_tokens to text. seed: from which requests without a seed get theirs.
    """

    __slots__ = (
        "_admission", "_cache", "_clock", "_executor", "_next_seq_id", "_num_computed_tokens", "_num_requests",
        "_num_steps", "_output", "_scheduler", "_seed", "_unfinished",
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
        self._unfinished: dict[str, list[Sequence]] = {}
        self._num_requests = 0
        self._next_seq_id = 0
        self._num_steps = 0
        self._num_computed_tokens = 0

    @property
    def limits(self) -> EngineLimits:
        """What requests are held to."""
        return self._admission.limits

    @property
    def has_unfinished(self) -> bool:
        """True while a request waits or runs: `step` has something to do."""
        return bool(self._unfinished)

    def stats(self) -> EngineStats:
        """Counts, in O(1)."""
        scheduler = self._scheduler
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_steps=self._num_steps,
            num_computed_tokens=self._num_computed_tokens,
            num_preemptions=scheduler.num_preemptions,
            cache=self._cache.stats(),
        )

    def check_request(self, prompt_token_ids: Ordered[int], params: SamplingParams) -> None:
        """Raise what `add_request` would raise for this prompt (RequestError, CapacityError), and change nothing."""
        self._admission.admit("", prompt_token_ids, params, 0, 0.0)

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Ordered[int],
        params: SamplingParams,
        arrival_s: float | None = None,
    ) -> Request:
        """Queue a request; its answer comes out of `step` as deltas, `params.n` choices of them.

        arrival_s: on the engine's clock, None for now. Raises RequestError for a wrong request or an id in use, and
        CapacityError for a prompt that no emptying of the cache would let in; the engine is unchanged then.
        """
        if request_id in self._unfinished:
            raise RequestError(f"request id {request_id!r} is in use; give each request its own", status=409)
        arrival_s = self._clock.now() if arrival_s is None else arrival_s
        seed = derive_seed(self._seed, self._num_requests)
        request = self._admission.admit(request_id, prompt_token_ids, params, seed, arrival_s)
        sequences = [self._sequence(request, choice) for choice in range(params.n)]
        self._num_requests += 1
        self._unfinished[request_id] = sequences
        for sequence in sequences:
            self._output.open(sequence)
            self._scheduler.add(sequence)
        return request

    def abort(self, request_id: str) -> list[Delta]:
        """End a request in whatever state and free its blocks. Returns the last delta of each choice still open;
        none where the request is unknown or has just finished."""
        return self._end(self._unfinished.get(request_id, ()), "abort")

    def step(self) -> list[Delta]:
        """Run one step. Returns what it added, in the plan's order; possibly nothing, for a chunk of a prompt."""
        schedule = self._scheduler.plan(self._clock.now())
        deltas = [delta for sequence, error in schedule.failed for delta in self._end([sequence], "error", error)]
        if not schedule.rows:
            return deltas
        self._num_steps += 1
        try:
            result = self._executor.run(schedule.step)
            self._commit(schedule, result)
        except Exception as error:
            return deltas + self._fail(schedule.rows, error)
        return deltas + self._deltas(schedule, result)

    def _commit(self, schedule: Schedule, result: StepResult) -> None:
        asked = [row for row, s in zip(schedule.rows, schedule.step.sequences, strict=True) if s.sample]
        check_answers(asked, result)
        for step in schedule.step.sequences:
            self._cache.commit(step.seq_id, step.end)
        self._num_computed_tokens += schedule.step.num_tokens

    def _deltas(self, schedule: Schedule, result: StepResult) -> list[Delta]:
        """What each sampled row tells. A row without a token, or whose text cannot be made, fails its own request."""
        now_s = self._clock.now()
        deltas = []
        samples = iter(result.samples)
        failures = {failure.seq_id: failure.reason for failure in result.failures}
        for sequence, step in zip(schedule.rows, schedule.step.sequences, strict=True):
            if not step.sample:
                continue
            if sequence.seq_id in failures:
                deltas += self._fail([sequence], RequestError(failures[sequence.seq_id], status=500))
                continue
            sample = next(samples)
            if sequence.status == "finished":  # a choice of a request that has failed in this loop
                continue
            try:
                delta = self._output.delta(sequence, sample, now_s)
            except Exception as error:
                deltas += self._fail([sequence], error)
                continue
            deltas.append(delta)
            if delta.finished:
                self._forget(sequence)
        return deltas

    def _fail(self, sequences: Iterable[Sequence], error: Exception) -> list[Delta]:
        """End every choice of the requests of `sequences` with the error."""
        deltas = []
        for request_id in dict.fromkeys(sequence.request.request_id for sequence in sequences):
            deltas += self._end(self._unfinished.get(request_id, ()), "error", error)
        return deltas

    def _end(self, sequences: Iterable[Sequence], reason: FinishReason, error: Exception | None = None) -> list[Delta]:
        deltas = []
        now_s = self._clock.now()
        for sequence in list(sequences):
            deltas.append(self._output.ending(sequence, reason, now_s, error))
            self._forget(sequence)
        return deltas

    def _forget(self, sequence: Sequence) -> None:
        """Blocks, text and place of a sequence that has ended; its request's when it was the last choice."""
        self._scheduler.remove(sequence)
        self._output.close(sequence)
        request_id = sequence.request.request_id
        self._unfinished[request_id].remove(sequence)
        if not self._unfinished[request_id]:
            del self._unfinished[request_id]

    def _sequence(self, request: Request, choice: int) -> Sequence:
        self._next_seq_id += 1
        tokens = array("i", request.prompt_token_ids)
        return Sequence(self._next_seq_id, request, choice, tokens, Marks(request.arrival_s))
