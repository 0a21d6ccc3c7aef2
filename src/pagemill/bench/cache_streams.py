"""Many sequences at a time: tokens of running streams while a long prompt arrives, and a thousand live sequences.

Owns these runs, which step an engine by hand; the model's own sampling and scheduling, greedy.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from pagemill.base.clock import Clock
from pagemill.base.config import SERVED_MIXED_STEP_PERCENT
from pagemill.base.errors import CapacityError, ConfigError, IntegrityError
from pagemill.base.params import SamplingParams
from pagemill.bench.cache_figures import Figure, Settings, Subject, Tell, raise_failures
from pagemill.bench.report import Row
from pagemill.engine.budget import PROBE_STEPS, SMALLEST_CHUNK
from pagemill.engine.engine import Engine

LATENCY, LIVE = "latency", "live"
STREAMS = (8, 32)
CHUNKS = (64, 128, 256, 512, 1024, 2048)
ARRIVING_TOKENS = 4096
LATENCY_GOAL, THROUGHPUT_GOAL = 2.0, 0.9
AT_ONCE, SERVED = "at once", "as served"
LIVE_SEQUENCES, LIVE_PROMPT, LIVE_ANSWER = 1024, 128, 64

_LEAST_ARRIVING = 128
_STREAM_PROMPT = 16
_ALONE_STEPS, _QUICK_ALONE_STEPS = 200, 40  # the 99th percentile of a few is the longest of them
_WARM_STEPS = 4
_P99 = 0.99


@dataclass(slots=True)
class Intervals:
    """Seconds between tokens of every stream, by a clock. Mutated by `step`."""

    clock: Clock
    seconds: list[float] = field(default_factory=list)
    _last: dict[str, float] = field(default_factory=dict)

    def step(self, engine: Engine) -> set[str]:
        """One step of the engine. Returns who got a token."""
        deltas = engine.step()
        now_s = self.clock.now()
        raise_failures(deltas)
        got = set()
        for delta in deltas:
            if delta.token_ids:
                got.add(delta.request_id)
                before = self._last.get(delta.request_id)
                if before is not None:
                    self.seconds.append(now_s - before)
                self._last[delta.request_id] = now_s
        return got

    def go_on_from(self, other: Intervals) -> None:
        """Count from the tokens that `other` saw last."""
        self._last = dict(other._last)

    def p99_s(self) -> float:
        """The 99th percentile."""
        return float(np.quantile(self.seconds, _P99))


@dataclass(frozen=True, slots=True)
class Cut:
    """How a prompt is cut that arrives while others decode. chunk: tokens of a step at the most. percent: how long a
    step may take, in percent of one that decodes alone, None for no bound."""

    name: str
    chunk: int
    percent: int | None = None


@dataclass(frozen=True, slots=True)
class Arrival:
    """One run: intervals of the streams alone, and while the prompt was read. rate: tokens computed per second then,
    prompt and answers."""

    alone: Intervals
    during: Intervals
    rate: float


Arrivals = dict[Cut, list[Arrival]]


def measure_latency(subject: Subject, settings: Settings, tell: Tell) -> list[Figure]:
    """The curve over the size of chunks for each number of streams, what is served by default, and the best of the
    curve that keeps the throughput of reading the prompt at once."""
    arriving = subject.longest(settings.size(ARRIVING_TOKENS + 1024, 256 + 128)) - settings.size(1024, 128)
    if arriving < _LEAST_ARRIVING:
        raise ConfigError(
            f"max_model_len is {subject.built.max_model_len:,}, which leaves no room for a long prompt; raise it, or "
            "leave latency out of --rows"
        )
    streams = STREAMS if not settings.quick else STREAMS[:1]
    chunks = CHUNKS if not settings.quick else (16, 64)
    rounds = min(settings.num_runs, 5) if not settings.quick else 1
    num_alone = settings.size(_ALONE_STEPS, _QUICK_ALONE_STEPS)
    found: list[Figure] = []
    for num_streams in streams:
        sizes = [each for each in chunks if num_streams < each < arriving]
        cuts = [
            *(Cut(f"chunks of {each:,}", each) for each in sizes),
            Cut(AT_ONCE, arriving + num_streams),
            Cut(SERVED, subject.built.config.max_num_batched_tokens, SERVED_MIXED_STEP_PERCENT),
        ]
        runs: Arrivals = {each: [] for each in cuts}
        for index in range(rounds):
            for cut in cuts:
                tell(f"{num_streams} streams, {cut.name}: round {index + 1} of {rounds}")
                runs[cut].append(_arrive(subject, num_streams, cut, arriving, num_alone))
        found += _latency_figures(num_streams, runs, arriving, full=not settings.quick)
    return found


def _arrive(subject: Subject, num_streams: int, cut: Cut, arriving: int, num_alone: int) -> Arrival:
    chunk = cut.chunk - num_streams if cut.percent is None else SMALLEST_CHUNK
    room = _STREAM_PROMPT + num_streams + arriving // chunk + arriving // (chunk * PROBE_STEPS) + num_alone
    room += 2 + 2 * _WARM_STEPS
    if room >= subject.built.max_model_len:
        raise ConfigError(
            f"{num_streams} streams with {cut.name} need {room:,} positions each while {arriving:,} are read, and "
            f"max_model_len is {subject.built.max_model_len:,}; raise it"
        )
    engine = subject.engine(
        num_streams * (room + 16) + arriving + 64,
        max_num_seqs=num_streams + 1,
        max_num_batched_tokens=cut.chunk,
        mixed_step_percent=cut.percent,
    )
    params = SamplingParams(temperature=0, max_tokens=room - _STREAM_PROMPT, ignore_eos=True, seed=0)
    names = {f"stream {index}" for index in range(num_streams)}
    for name in names:
        engine.add_request(name, subject.prompt(_STREAM_PROMPT), params)
    warm, alone, during = (Intervals(subject.clock) for _ in range(3))
    together = 0
    while together < _WARM_STEPS:
        together += warm.step(engine) == names
    subject.settle()
    for _ in range(num_alone + 1):
        alone.step(engine)
    first_token = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, seed=0)
    engine.add_request("arriving", subject.prompt(arriving), first_token)
    during.go_on_from(alone)
    began = subject.clock.now()
    while "arriving" not in during.step(engine):
        pass
    rate = (arriving + len(during.seconds)) / (subject.clock.now() - began)
    for name in names:
        engine.abort(name)
    return Arrival(alone, during, rate)


def _latency_figures(num_streams: int, runs: Arrivals, arriving: int, *, full: bool) -> list[Figure]:
    full_rate = median(each.rate for cut, arrivals in runs.items() if cut.name == AT_ONCE for each in arrivals)
    alone_s = median(each.alone.p99_s() for arrivals in runs.values() for each in arrivals)
    alone = _p99s(each.alone for arrivals in runs.values() for each in arrivals)
    work = f"{num_streams} streams, {arriving:,} arriving"
    mine = {"streams": num_streams}
    found = [Figure(LATENCY, Row(f"{num_streams} streams alone", "decoding", "ms p99", alone), more=mine)]
    fixed: list[tuple[float, float, Cut]] = []
    served = (0.0, 0.0)
    for cut, arrivals in runs.items():
        ratio = median(each.during.p99_s() for each in arrivals) / alone_s
        share = median(each.rate for each in arrivals) / full_rate
        chunk = cut.chunk if cut.percent is None else None
        more = mine | {"chunk": chunk, "p99_ratio": ratio, "throughput_share": share}
        found.append(Figure(LATENCY, Row(work, cut.name, "ms p99", _p99s(e.during for e in arrivals)), more=more))
        found.append(Figure(LATENCY, Row(work, cut.name, "tok/s", tuple(e.rate for e in arrivals)), more=more))
        if cut.percent is None:
            fixed.append((ratio, share, cut))
        else:
            served = (ratio, share)
    at_most, at_least = (LATENCY_GOAL, THROUGHPUT_GOAL) if full else (None, None)
    slowest = f"{work}: p99 ÷ alone"
    found.append(Figure(LATENCY, Row(slowest, SERVED, "×", served[:1]), at_most=at_most, more=mine))
    row = Row(f"{work}: throughput ÷ at once", SERVED, "×", served[1:])
    found.append(Figure(LATENCY, row, at_least=at_least, more=mine))
    ratio, share, cut = min((each for each in fixed if each[1] >= THROUGHPUT_GOAL), key=lambda each: each[0])
    row = Row(f"{slowest} at ≥ {THROUGHPUT_GOAL:.0%} throughput", cut.name, "×", (ratio,))
    found.append(Figure(LATENCY, row, at_most=at_most, more=mine | {"best_share": share}))
    return found


def _p99s(intervals: Iterable[Intervals]) -> tuple[float, ...]:
    return tuple(1e3 * each.p99_s() for each in intervals)


def measure_live(subject: Subject, settings: Settings, tell: Tell) -> list[Figure]:
    """All sequences in the running set at once, each to its end. Raises IntegrityError where one came short."""
    count = settings.size(LIVE_SEQUENCES, 48)
    num_prompt, num_answer = settings.size(LIVE_PROMPT, 32), settings.size(LIVE_ANSWER, 16)
    tell(f"{count:,} live sequences of {num_prompt} tokens in and {num_answer} out")
    engine = subject.engine(
        count * (num_prompt + num_answer + 16), max_num_seqs=count, max_num_batched_tokens=4 * count
    )
    params = SamplingParams(temperature=0, max_tokens=num_answer, ignore_eos=True, seed=0)
    for index in range(count):
        engine.add_request(f"live {index}", subject.prompt(num_prompt), params)
    tokens = dict.fromkeys((f"live {index}" for index in range(count)), 0)
    last_step: dict[str, int] = {}
    intervals = Intervals(subject.clock)
    most_running = longest_gap = step = 0
    began = subject.clock.now()
    while engine.has_unfinished:
        got = intervals.step(engine)
        stats = engine.stats()
        step += 1
        most_running = max(most_running, stats.num_running)
        for name in got:
            tokens[name] += 1
            longest_gap = max(longest_gap, step - last_step.get(name, step))
            last_step[name] = step
    seconds = subject.clock.now() - began
    short = [name for name, got in tokens.items() if got != num_answer]
    if short:
        raise IntegrityError(f"{short[0]} got {tokens[short[0]]} of {num_answer} tokens; report this as a bug")
    if stats.num_preemptions:
        raise CapacityError(f"{stats.num_preemptions} sequences were preempted, so that not all were live at once")
    work = f"{count:,} sequences, {num_prompt} in, {num_answer} out, KV {subject.built.kv_spec.codec}"
    goal = count if not settings.quick else None
    return [
        Figure(LIVE, Row(work, "running at once", "sequences", (float(most_running),)), at_least=goal),
        Figure(LIVE, Row(work, "steps from token to token, most", "steps", (float(longest_gap),)), at_most=1),
        Figure(LIVE, Row(work, "generated", "tok/s", (count * num_answer / seconds,))),
        Figure(LIVE, Row(work, "between tokens", "ms p99", (1e3 * intervals.p99_s(),))),
        Figure(LIVE, Row(work, "all of it", "s", (seconds,))),
    ]
