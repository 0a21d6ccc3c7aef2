"""Serves a trace with the engine itself - admission, scheduler, cache - over an executor that computes nothing and
takes the time that a real one would. Owns the cost of a step, the virtual day and what was seen of it.

The text of a trace's block is its number over and over, so that two prompts have in common what their blocks say; what
is generated is nobody else's text.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pagemill.base.clock import VirtualClock
from pagemill.base.config import SERVED_MIXED_STEP_PERCENT, SERVED_QUEUED_REQUESTS
from pagemill.base.errors import CapacityError, ConfigError, DeadlineError, PagemillError, QueueFullError
from pagemill.base.params import CacheOptions, SamplingParams
from pagemill.base.step import Sample, SequenceStep, StepPlan, StepResult
from pagemill.cache.entry import SharingConfig
from pagemill.cache.manager import CacheManager
from pagemill.cache.policies.registry import POLICIES, Makers
from pagemill.engine.admission import EngineLimits
from pagemill.engine.engine import Engine
from pagemill.engine.output import Delta
from pagemill.simulator.trace import Request, Trace

BLOCK_TOKENS = 16  # of traces that have lengths only
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of a step: base_s, and row_s for each sequence that decodes, token_s for each prompt token, read_s for
    each earlier position that a row of either kind attends to. source: where the figures come from.

    Raises ConfigError for figures that are negative or all 0.
    """

    base_s: float
    row_s: float
    token_s: float
    read_s: float
    source: str = ""

    def __post_init__(self) -> None:
        figures = self.base_s, self.row_s, self.token_s, self.read_s
        if not all(0 <= each < 1e6 for each in figures) or not any(figures):
            raise ConfigError(f"a cost model has the figures {figures}; give seconds, none below 0 and one above")

    def seconds(self, steps: tuple[SequenceStep, ...]) -> float:
        """How long a step with these rows takes."""
        total = self.base_s
        for step in steps:
            count = len(step.token_ids)
            total += self.row_s if count == 1 else count * self.token_s
            total += self.read_s * count * (step.start + count / 2)
        return total

    def describe(self) -> dict[str, Any]:
        """As JSON has it."""
        return {name: getattr(self, name) for name in ("base_s", "row_s", "token_s", "read_s", "source")}


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """The server that is simulated. num_blocks: of the cache, of the trace's block size. pace: by which times between
    arrivals are multiplied. tenant_of: number of a request -> its tenant, in the order of arrival. weights: of tenants.
    deadline_s: of every request, after its arrival; None for none. target_itl_s: held to instead of mixed_step_percent;
    None for none. makers: of the policies.
    """

    num_blocks: int
    policy: str = "lru"
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    mixed_step_percent: int | None = SERVED_MIXED_STEP_PERCENT
    max_queued_requests: int | None = SERVED_QUEUED_REQUESTS
    pace: float = 1.0
    tenant_of: Callable[[int], str] = field(default=lambda index: "default")
    weights: tuple[tuple[str, float], ...] = ()
    deadline_s: float | None = None
    target_itl_s: float | None = None
    makers: Makers = field(default_factory=lambda: POLICIES, compare=False, repr=False)


@dataclass(slots=True)
class Served:
    """What was seen of the day. Mutated by the simulation. Times in seconds; ttft_s, e2e_s: of each request that
    finished, by tenant; gaps_s: between tokens, of all. num_refused: by a full queue; num_too_large: by the cache;
    num_expired: those that failed at their deadline.
    """

    num_requests: int = 0
    num_finished: int = 0
    num_refused: int = 0
    num_too_large: int = 0
    num_failed: int = 0
    num_expired: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    seconds: float = 0.0
    busy_s: float = 0.0
    ttft_s: dict[str, array[float]] = field(default_factory=dict)
    e2e_s: dict[str, array[float]] = field(default_factory=dict)
    gaps_s: array[float] = field(default_factory=lambda: array("d"))

    def describe(self) -> dict[str, Any]:
        """As JSON has it: counts, rates over the time that the engine was busy, percentiles."""
        busy_s = max(self.busy_s, 1e-9)
        return {
            "num_requests": self.num_requests,
            "num_finished": self.num_finished,
            "num_refused": self.num_refused,
            "num_too_large": self.num_too_large,
            "num_failed": self.num_failed,
            "num_expired": self.num_expired,
            "num_steps": self.num_steps,
            "num_preemptions": self.num_preemptions,
            "seconds": self.seconds,
            "busy_s": self.busy_s,
            "finished_per_s": self.num_finished / max(self.seconds, 1e-9),
            "token_hit_ratio": self.num_cached_tokens / max(self.num_prompt_tokens, 1),
            "prompt_tokens_per_s": self.num_prompt_tokens / busy_s,
            "generated_tokens_per_s": self.num_generated_tokens / busy_s,
            "ttft_s": percentiles(_joined(self.ttft_s)),
            "itl_s": percentiles(self.gaps_s),
            "e2e_s": percentiles(_joined(self.e2e_s)),
        }


def percentiles(values: array[float]) -> dict[str, float]:
    """p50, p90, p99 of the values, 0 where there are none."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return {f"p{each}": ordered[round(each / 100 * last)] if ordered else 0.0 for each in PERCENTILES}


def serve(
    trace: Trace, cost: StepCost, settings: ServeSettings, report: Callable[[int, int], None] | None = None
) -> Served:
    """Serve all requests of a trace, by their times. report: told (requests that ended, requests) now and then.

    Raises ConfigError for a cache without blocks, an unknown policy, a trace without requests.
    """
    if not trace.requests:
        raise ConfigError(f"{trace.name} has no requests; give a trace with some")
    check_pace("pace", settings.pace)
    return _Day(trace, cost, settings).run(report)


def check_pace(name: str, pace: float) -> None:
    """Raise ConfigError for a pace at which nothing can be served. name: what the message calls it."""
    if not 0 < pace < 1e6:
        raise ConfigError(
            f"{name} is {pace:g}; give a number above 0: 2 is half as many requests a second, 0.5 twice as many"
        )


class _Timed:
    """An executor that lets time pass. Mutated by `run`."""

    def __init__(self, cost: StepCost, clock: VirtualClock, first_token: int, num_tokens: int) -> None:
        self._cost, self._clock = cost, clock
        self._first_token, self._num_tokens = first_token, num_tokens

    def run(self, plan: StepPlan) -> StepResult:
        if plan.sequences:
            self._clock.advance(self._cost.seconds(plan.sequences))
        first, count = self._first_token, self._num_tokens
        return StepResult(tuple(Sample(s.seq_id, first + s.seq_id % count) for s in plan.sequences if s.sample))

    def resize(self, num_blocks: int) -> None:
        """It has no blocks of its own."""


class _Day:
    """One simulation. Mutated by `run`."""

    def __init__(self, trace: Trace, cost: StepCost, settings: ServeSettings) -> None:
        self._trace, self._settings = trace, settings
        self._numbers: dict[int, int] = {}
        for request in trace.requests:
            for block in request.blocks:
                self._numbers.setdefault(block, len(self._numbers))
        own = len(self._numbers)  # from here on tokens that only one request has
        vocab_size = own + 2 * len(trace.requests) + 2
        longest = max(each.num_input_tokens + max(each.num_output_tokens, 1) for each in trace.requests) + 2
        self._clock = VirtualClock()
        sharing = SharingConfig(settings.policy, makers=settings.makers)
        self._cache = CacheManager(settings.num_blocks, trace.block_tokens or BLOCK_TOKENS, "paged", sharing)
        limits = EngineLimits(
            max_model_len=longest,
            vocab_size=vocab_size,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            mixed_step_percent=settings.mixed_step_percent,
            max_queued_requests=settings.max_queued_requests,
            target_itl_s=settings.target_itl_s,
        )
        executor = _Timed(cost, self._clock, own + len(trace.requests), len(trace.requests))
        self._engine = Engine(executor, self._cache, limits, _no_text, self._clock)
        for tenant, weight in settings.weights:
            self._engine.grant(tenant, weight)
        self._served = Served(num_requests=len(trace.requests))
        self._last_s: dict[str, float] = {}
        self._tenants: dict[str, str] = {}

    def run(self, report: Callable[[int, int], None] | None) -> Served:
        requests, engine, clock, served = self._trace.requests, self._engine, self._clock, self._served
        at = 0
        while at < len(requests) or engine.has_unfinished:
            while at < len(requests) and requests[at].time_s * self._settings.pace <= clock.now():
                self._arrive(at, requests[at])
                at += 1
            if not engine.has_unfinished:
                if at < len(requests):
                    clock.advance(max(requests[at].time_s * self._settings.pace - clock.now(), 1e-9))
                continue
            before_s = clock.now()
            for delta in engine.step():
                self._see(delta)
            served.busy_s += clock.now() - before_s
            if report is not None and engine.stats().num_steps % 256 == 0:
                report(at - len(self._tenants), len(requests))
        stats = engine.stats()
        served.num_steps, served.num_preemptions = stats.num_steps, stats.num_preemptions
        served.seconds = clock.now()
        return served

    def _arrive(self, index: int, request: Request) -> None:
        name, served = str(index), self._served
        tenant = self._settings.tenant_of(index)
        params = SamplingParams(
            temperature=0.0,
            max_tokens=max(request.num_output_tokens, 1),
            ignore_eos=True,
            deadline_s=self._settings.deadline_s,
        )
        arrival_s = request.time_s * self._settings.pace
        try:
            self._engine.add_request(
                name, self._prompt(index, request), params, arrival_s=arrival_s, cache=CacheOptions(tenant=tenant)
            )
        except QueueFullError:
            served.num_refused += 1
        except CapacityError:
            served.num_too_large += 1
        else:
            self._tenants[name] = tenant

    def _prompt(self, index: int, request: Request) -> array[int]:
        size, count = self._trace.block_tokens, max(request.num_input_tokens, 1)
        prompt = array("i")
        for block in request.blocks:
            prompt.extend([self._numbers[block]] * size)
        del prompt[count:]
        prompt.extend([len(self._numbers) + index] * (count - len(prompt)))
        return prompt

    def _see(self, delta: Delta) -> None:
        served, name, marks = self._served, delta.request_id, delta.marks
        now_s = self._clock.now()
        if delta.token_ids:
            served.num_generated_tokens += len(delta.token_ids)
            last_s = self._last_s.get(name)
            if last_s is not None:
                served.gaps_s.append(now_s - last_s)
            self._last_s[name] = now_s
        if not delta.finished:
            return
        tenant = self._tenants.pop(name)
        self._last_s.pop(name, None)
        if delta.error is not None:
            if not isinstance(delta.error, PagemillError):
                raise delta.error
            served.num_failed += 1
            served.num_expired += isinstance(delta.error, DeadlineError)
            return
        assert marks.first_token_s is not None
        assert marks.finished_s is not None
        served.num_finished += 1
        served.num_cached_tokens += delta.num_cached_tokens
        served.num_prompt_tokens += 0 if delta.receipt is None else delta.receipt.num_prompt_tokens
        served.ttft_s.setdefault(tenant, array("d")).append(marks.first_token_s - marks.arrival_s)
        served.e2e_s.setdefault(tenant, array("d")).append(marks.finished_s - marks.arrival_s)


def _no_text(token_ids: object, skip_special_tokens: bool) -> str:
    return ""


def _joined(by_tenant: dict[str, array[float]]) -> array[float]:
    joined = array("d")
    for values in by_tenant.values():
        joined.extend(values)
    return joined
