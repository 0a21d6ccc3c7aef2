"""`bench kvcache --beside transformers`: the same generation by Pagemill and by transformers, with the KV cache and
without it, in one interleaved run.

Owns the peer's shape and environment, warm-up, order, and what happens to a peer that fails: it is left out of what
follows, with the reason. The model, its prompt and the engines are `kvcache`'s, the report `kvcache_beside_report`'s.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

from pagemill.base.errors import ConfigError
from pagemill.base.model_spec import ModelSpec
from pagemill.bench import kvcache
from pagemill.bench.generation import Generation, generate_timed
from pagemill.bench.kvcache import MAX_RUNS, WEIGHTS_SEED, WITH, WITHOUT, Subject, check_same_tokens
from pagemill.bench.machine import CpuCounters, barrier_ns, disturbance, read_counters
from pagemill.bench.peers_catalog import PAGEMILL, PEERS, SCRIPTS, Contestant
from pagemill.bench.peers_setup import SetupError, Tell, find_environment, set_up
from pagemill.bench.peers_worker import Loaded, Worker, WorkerError

TRANSFORMERS = "transformers"
WARM_UP_TOKENS = 17
# In the order of the worker's alternatives.
CACHES = (WITH, WITHOUT)


@dataclass(frozen=True, slots=True)
class Settings:
    """What to compare. own: tokens, prompt, and runs with the cache. num_runs_without: runs without it, 0 for none.
    timeout_s: for one answer of the peer. Raises ConfigError for numbers that cannot be."""

    own: kvcache.Settings
    num_runs_without: int
    num_threads: int
    timeout_s: float

    def __post_init__(self) -> None:
        if not 0 <= self.num_runs_without <= MAX_RUNS:
            raise ConfigError(
                f"--runs-without is {self.num_runs_without}; beside a peer give a number from 0 to {MAX_RUNS:,}"
            )
        if not 1 <= self.timeout_s <= 86_400:
            raise ConfigError(f"--timeout is {self.timeout_s:g}; give seconds from 1 to 86,400")

    def runs_of(self, cache: str) -> int:
        """Runs with the cache or without it."""
        return self.own.num_runs if cache == WITH else self.num_runs_without


@dataclass(slots=True)
class Series:
    """Samples of one engine with one kind of weights, in seconds of a whole generation. Mutated as they come."""

    engine: str
    dtype: str
    cache: str
    samples: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Measurement:
    """What was found. Mutated as it comes in. failures: why a peer was left out, from then on. barriers: nanoseconds,
    one for each round."""

    series: list[Series] = field(default_factory=list)
    loads: dict[Contestant, Loaded] = field(default_factory=dict)
    failures: dict[Contestant, str] = field(default_factory=dict)
    barriers: list[float] = field(default_factory=list)
    cpu_shares: dict[str, float] | None = None
    interrupted: bool = False


class Watcher(Protocol):
    """Is told how the comparison goes, off the clock."""

    def loaded(self, contestant: Contestant, loaded: Loaded) -> None:
        """A peer has made its model."""
        ...

    def warming(self, engine: str, dtype: str) -> None:
        """An engine is about to warm up."""
        ...

    def sampled(self, series: Series, index: int) -> None:
        """Sample `index` (from 0) was taken; it is the last one of the series."""
        ...

    def failed(self, contestant: Contestant, reason: str) -> None:
        """A peer is left out from here on."""
        ...


def peer_config(spec: ModelSpec) -> dict[str, Any]:
    """The shape in the keys of transformers' GPT2Config. Raises ConfigError for a model of another family."""
    if spec.family != "gpt2" or not spec.tied_head:
        raise ConfigError(
            f"--beside transformers puts GPT-2's shape beside ours, and {spec.name} is of family {spec.family}; give "
            "--model gpt2-medium, or leave --beside out (`pagemill bench peers` compares other models)"
        )
    return {
        "vocab_size": spec.vocab_size,
        "n_positions": spec.context_length,
        "n_embd": spec.hidden_dim,
        "n_layer": spec.num_layers,
        "n_head": spec.num_q_heads,
        "n_inner": spec.ffn_dim,
        "layer_norm_epsilon": spec.norm_eps,
    }


def contestants(spec: ModelSpec, root: Path, python: str | None, tell: Tell) -> tuple[list[Contestant], dict[str, str]]:
    """transformers in each of its forms, set up below `root` where it is missing, and why it cannot be had.

    python: one that has it already. Raises ConfigError where that one has not, and for a shape that is not GPT-2's.
    """
    config = peer_config(spec)
    peer = next(each for each in PEERS if each.name == TRANSFORMERS)
    try:
        environment = find_environment(peer, root, python) or set_up(peer, root, tell)
    except SetupError as error:
        return [], {peer.name: str(error)}
    command = (str(environment.python), str(SCRIPTS / peer.script))
    return [
        Contestant(
            peer.name,
            form.mode,
            command,
            spec.name,
            {**dict(form.options), "seed": WEIGHTS_SEED, "config": config},
            environment.note,
        )
        for form in peer.forms
    ], {}


def measure(
    subjects: Sequence[Subject],
    peers: Sequence[Contestant],
    settings: Settings,
    watcher: Watcher,
    *,
    interrupted: Callable[[], bool] = lambda: False,
) -> Measurement:
    """Time greedy generations of the same number of tokens from the same prompt ids, ours and theirs in turns.

    A sample is the generation alone: models are made and warmed up before. subjects: of one shape, one for each kind of
    weights. interrupted: asked between samples, and between our tokens. Raises IntegrityError where our own runs with
    one kind of weights gave different tokens.
    """
    with ExitStack() as stack:
        run = _Run(settings, watcher, interrupted)
        ours: list[_Side] = [_Ours(each, interrupted) for each in subjects]
        theirs = run.load(peers, list(subjects[0].prompt), stack)
        for pair in zip_longest(ours, theirs):
            run.sides += [side for side in pair if side is not None]
        before = run.counters()
        run.measure()
        run.found.cpu_shares = disturbance(before, run.counters())
        run.found.interrupted = interrupted()
        return run.found


class _Side(Protocol):
    """One engine with one kind of weights."""

    engine: str
    dtype: str

    def generate(self, cache: str, num_tokens: int) -> float | None:
        """Seconds of a generation; None where it was interrupted. Raises WorkerError."""
        ...


class _Ours:
    """Pagemill. Mutated by `generate`, which keeps the longest run to compare tokens with."""

    def __init__(self, subject: Subject, interrupted: Callable[[], bool]) -> None:
        self.engine, self.dtype = PAGEMILL, subject.dtype
        self._subject, self._interrupted = subject, interrupted
        self._longest: Generation | None = None

    def generate(self, cache: str, num_tokens: int) -> float | None:
        def after_token(index: int, seconds: float) -> bool:
            return not self._interrupted()

        llm = self._subject.engines[cache]
        run = generate_timed(llm, self._subject.prompt, num_tokens, mode=cache, after_token=after_token)
        if self._longest is not None:
            check_same_tokens([self._longest, run])
        if self._longest is None or len(run.token_ids) > len(self._longest.token_ids):
            self._longest = run
        return run.total_s() if run.complete else None


class _Theirs:
    """A peer in a process of its own. Mutated by every request, as its worker is."""

    def __init__(self, contestant: Contestant, worker: Worker, prompt: list[int]) -> None:
        self.engine, self.dtype = contestant.engine, contestant.mode
        self.contestant, self.worker, self._prompt = contestant, worker, prompt

    def generate(self, cache: str, num_tokens: int) -> float | None:
        return self.worker.generate([self._prompt], num_tokens, CACHES.index(cache))


class _Run:
    """The sides while they are measured. Mutated by `load` and `measure`."""

    def __init__(self, settings: Settings, watcher: Watcher, interrupted: Callable[[], bool]) -> None:
        self.settings, self.watcher, self.interrupted = settings, watcher, interrupted
        self.found = Measurement()
        self.sides: list[_Side] = []
        self._workers: list[Worker] = []

    def counters(self) -> CpuCounters | None:
        """Of the machine, with the workers' own time counted as ours."""
        times = os.times()
        ended_s = times.children_user + times.children_system
        return read_counters(beside_s=ended_s + sum(worker.cpu_s() for worker in self._workers))

    def load(self, peers: Sequence[Contestant], prompt: list[int], stack: ExitStack) -> list[_Theirs]:
        sides = []
        for peer in peers:
            if self.interrupted():
                break
            try:
                with ExitStack() as started:
                    worker = Worker(peer.command, timeout_s=self.settings.timeout_s, python_path=peer.python_path)
                    started.enter_context(worker)
                    loaded = worker.load(peer.model, self.settings.num_threads, peer.options)
                    stack.push(started.pop_all())
            except WorkerError as error:
                self._fail(peer, error)
                continue
            self._workers.append(worker)
            self.found.loads[peer] = loaded
            self.watcher.loaded(peer, loaded)
            sides.append(_Theirs(peer, worker, prompt))
        return sides

    def measure(self) -> None:
        caches = [cache for cache in CACHES if self.settings.runs_of(cache)]
        warm_up = min(WARM_UP_TOKENS, self.settings.own.num_tokens)
        for side in list(self.sides):
            if self.interrupted():
                return
            self.watcher.warming(side.engine, side.dtype)
            for cache in caches:
                if side in self.sides:
                    self._attempt(side, cache, warm_up)
        series = {
            (side.engine, side.dtype, cache): Series(side.engine, side.dtype, cache)
            for cache in caches
            for side in self.sides
        }
        self.found.series = list(series.values())
        for index in range(max(map(self.settings.runs_of, caches))):
            if self.interrupted():
                return
            self.found.barriers.append(barrier_ns(self.settings.num_threads))
            for cache in caches:
                if index < self.settings.runs_of(cache):
                    for side in list(self.sides):
                        self._sample(side, series[side.engine, side.dtype, cache], index)

    def _sample(self, side: _Side, series: Series, index: int) -> None:
        if self.interrupted():
            return
        seconds = self._attempt(side, series.cache, self.settings.own.num_tokens)
        if seconds is not None:
            series.samples.append(seconds)
            self.watcher.sampled(series, index)

    def _attempt(self, side: _Side, cache: str, num_tokens: int) -> float | None:
        try:
            return side.generate(cache, num_tokens)
        except WorkerError as error:
            assert isinstance(side, _Theirs)
            self.sides.remove(side)
            side.worker.close()
            self._fail(side.contestant, error)
            return None

    def _fail(self, contestant: Contestant, error: WorkerError) -> None:
        self.found.failures[contestant] = str(error)
        self.watcher.failed(contestant, str(error))
