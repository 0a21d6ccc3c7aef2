"""The measurement of `pagemill bench peers`: every engine in a process of its own, all rows interleaved.

Owns prompts, warm-up, order, the choice among a peer's alternatives, and what happens to an engine that fails: it is
left out of what follows, with the reason. Reports are made elsewhere.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from pagemill.base.errors import ConfigError
from pagemill.bench.machine import CpuCounters, barrier_ns, disturbance, read_counters
from pagemill.bench.peers_catalog import PAGEMILL, Contestant, Work
from pagemill.bench.peers_worker import Loaded, Worker, WorkerError

MAX_RUNS = 1000
TRIAL_STREAMS = 8
TRIAL_TOKENS = 17
_TRIALS = 2
_ATTEMPTS = 3
_PLAIN_IDS = 256  # below, vocabularies keep special tokens and bytes


@dataclass(frozen=True, slots=True)
class Settings:
    """works: rows to measure. num_runs: samples of each row. timeout_s: for one answer of a worker. vocab_size: prompts
    are drawn below it. Raises ConfigError for numbers that cannot be."""

    works: tuple[Work, ...]
    num_runs: int
    num_threads: int
    timeout_s: float
    vocab_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.num_runs <= MAX_RUNS:
            raise ConfigError(f"--runs is {self.num_runs}; give a number from 1 to {MAX_RUNS:,}")
        if not 1 <= self.timeout_s <= 86_400:
            raise ConfigError(f"--timeout is {self.timeout_s:g}; give seconds from 1 to 86,400")


class Observer(Protocol):
    """Told how the measurement goes on."""

    def loaded(self, contestant: Contestant, loaded: Loaded) -> None: ...

    def began(self, work: Work) -> None: ...

    def sampled(self, contestant: Contestant, work: Work, index: int, value: float) -> None: ...

    def failed(self, contestant: Contestant, reason: str) -> None: ...


@dataclass(slots=True)
class Measured:
    """What was found for one row. Mutated as samples come. barriers: nanoseconds, one for each round."""

    work: Work
    samples: dict[Contestant, list[float]] = field(default_factory=dict)
    alternatives: dict[Contestant, int] = field(default_factory=dict)
    barriers: list[float] = field(default_factory=list)
    cpu_shares: dict[str, float] | None = None


_Key = tuple[int, ...]
_MeasureOne = Callable[[Contestant, Measured, _Key], float | None]


@dataclass(slots=True)
class Measurement:
    """What was found. Mutated as it comes in. failures: why an engine was left out, from then on. without_peers: every
    peer had failed in the end, and no row was begun from then on."""

    rows: list[Measured] = field(default_factory=list)
    loads: dict[Contestant, Loaded] = field(default_factory=dict)
    failures: dict[Contestant, str] = field(default_factory=dict)
    cpu_shares: dict[str, float] | None = None
    interrupted: bool = False
    without_peers: bool = False


def measure(
    contestants: Sequence[Contestant],
    settings: Settings,
    observer: Observer,
    *,
    interrupted: Callable[[], bool] = lambda: False,
) -> Measurement:
    """Run every row on every engine, A B A B, `num_runs` times after a warm-up.

    prefill: prompt tokens ÷ time of a request for one token. decode: all streams' tokens ÷ (time of a request for
    num_tokens − time of one for a single token). start: from making the process to having the first token. A prompt
    is never used twice, and all engines get the same ones. Where every peer has failed, no further row is begun: there
    is nothing to compare with.
    """
    with ExitStack() as stack:
        run = _Run(settings, observer, stack, interrupted)
        for contestant in contestants:
            if not interrupted():
                run.load(contestant)
        before = run.counters()
        for index in range(len(settings.works)):
            if interrupted() or not run.has_peers:
                break
            run.row(index)
        run.found.cpu_shares = disturbance(before, run.counters())
        run.found.interrupted = interrupted()
        run.found.without_peers = not run.found.interrupted and not run.has_peers
        return run.found


def draw_prompts(work: Work, key: Sequence[int], vocab_size: int) -> list[list[int]]:
    """Distinct prompts of plain token ids, one a stream, the same for the same key."""
    low = min(_PLAIN_IDS, vocab_size // 2)
    ids = np.random.default_rng(list(key)).integers(low, vocab_size, (work.num_streams, work.num_prompt_tokens))
    return [[int(each) for each in row] for row in ids]


class _Run:
    """The workers while they are measured. Mutated by `load` and `row`."""

    def __init__(
        self, settings: Settings, observer: Observer, stack: ExitStack, interrupted: Callable[[], bool]
    ) -> None:
        self.settings, self.observer, self.stack, self.interrupted = settings, observer, stack, interrupted
        self.found = Measurement()
        self.workers: dict[Contestant, Worker] = {}

    @property
    def has_peers(self) -> bool:
        """Whether an engine other than Pagemill is left."""
        return any(contestant.engine != PAGEMILL for contestant in self.workers)

    def counters(self) -> CpuCounters | None:
        """Of the machine, with the workers' own time counted as ours."""
        times = os.times()
        ended_s = times.children_user + times.children_system
        return read_counters(beside_s=ended_s + sum(worker.cpu_s() for worker in self.workers.values()))

    def load(self, contestant: Contestant) -> None:
        try:
            worker = self.stack.enter_context(self._start(contestant))
            loaded = worker.load(contestant.model, self.settings.num_threads, contestant.options)
        except WorkerError as error:
            self._fail(contestant, error)
            return
        self.workers[contestant] = worker
        self.found.loads[contestant] = loaded
        self.observer.loaded(contestant, loaded)

    def row(self, index: int) -> None:
        """Warm up and measure one row on every engine that is left."""
        work = self.settings.works[index]
        row = Measured(work)
        self.found.rows.append(row)
        self.observer.began(work)
        if work.kind != "start":
            for contestant in list(self.workers):
                if not self.interrupted():
                    self._attempt(contestant, self._choose, row, (index, MAX_RUNS))
        before = self.counters()
        for run in range(self.settings.num_runs):
            if self.interrupted():
                break
            row.barriers.append(barrier_ns(self.settings.num_threads))
            for contestant in list(self.workers):
                if self.interrupted():
                    break
                value = self._attempt(contestant, self._sample, row, (index, run))
                if value is not None:
                    row.samples.setdefault(contestant, []).append(value)
                    self.observer.sampled(contestant, work, run, value)
        row.cpu_shares = disturbance(before, self.counters())

    def _attempt(self, contestant: Contestant, measure_one: _MeasureOne, row: Measured, key: _Key) -> float | None:
        try:
            return measure_one(contestant, row, key)
        except WorkerError as error:
            self._fail(contestant, error)
            return None

    def _fail(self, contestant: Contestant, error: WorkerError) -> None:
        worker = self.workers.pop(contestant, None)
        if worker is not None:
            worker.close()
        self.found.failures[contestant] = str(error)
        self.observer.failed(contestant, str(error))

    def _start(self, contestant: Contestant) -> Worker:
        return Worker(contestant.command, timeout_s=self.settings.timeout_s, python_path=contestant.python_path)

    def _choose(self, contestant: Contestant, row: Measured, key: _Key) -> None:
        """Warm up, and keep the fastest of the engine's alternatives for this row; with more than TRIAL_STREAMS
        streams, what was kept in the last row of several streams, since each trial takes minutes there."""
        work, worker = row.work, self.workers[contestant]
        count = self.found.loads[contestant].num_alternatives
        several = [
            each for each in self.found.rows[:-1] if each.work.num_streams > 1 and contestant in each.alternatives
        ]
        num_tokens = min(work.num_tokens, TRIAL_TOKENS)
        if work.num_streams > TRIAL_STREAMS and several:
            row.alternatives[contestant] = several[-1].alternatives[contestant]
            self._time(worker, work, key, num_tokens, row.alternatives[contestant])
            return
        took: list[float] = []
        num_trials = 1 + (_TRIALS if count > 1 else 0)
        for alternative in range(count):
            if took and self.interrupted():
                break
            keys = [(*key, trial, alternative) for trial in range(num_trials)]
            times = [self._time(worker, work, each, num_tokens, alternative) for each in keys]
            took.append(min(times[1:], default=0.0))
        row.alternatives[contestant] = took.index(min(took))

    def _sample(self, contestant: Contestant, row: Measured, key: _Key) -> float:
        work = row.work
        if work.kind == "start":
            return self._time_start(contestant, work, key)
        worker, alternative = self.workers[contestant], row.alternatives[contestant]
        if work.kind == "prefill":
            return work.num_prompt_tokens / self._time(worker, work, key, 1, alternative)
        for attempt in range(_ATTEMPTS):
            first = self._time(worker, work, (*key, attempt), 1, alternative)
            whole = self._time(worker, work, (*key, attempt), work.num_tokens, alternative)
            if whole > first:
                return work.num_streams * (work.num_tokens - 1) / (whole - first)
        raise WorkerError(f"took no longer for {work.num_tokens} tokens than for one, {_ATTEMPTS} times in a row")

    def _time_start(self, contestant: Contestant, work: Work, key: _Key) -> float:
        [prompt] = draw_prompts(work, (self.settings.seed, *key, 1), self.settings.vocab_size)
        began_s = time.perf_counter()
        with self._start(contestant) as worker:
            worker.load(contestant.model, self.settings.num_threads, contestant.options)
            worker.generate([prompt], work.num_tokens)
            return time.perf_counter() - began_s

    def _time(self, worker: Worker, work: Work, key: _Key, num_tokens: int, alternative: int) -> float:
        prompts = draw_prompts(work, (self.settings.seed, *key, num_tokens), self.settings.vocab_size)
        return worker.generate(prompts, num_tokens, alternative)
