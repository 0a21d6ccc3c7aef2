"""What the prefix cache costs where nothing is shared: its own calls, wiping apart, and bytes beside f16.

Owns the counters around the cache's calls. They stand on the engine's side of each call, so that they count themselves
too; a call within a call counts once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from pagemill.base.params import SamplingParams
from pagemill.base.step import StepPlan, StepResult
from pagemill.base.transfer import Moves
from pagemill.bench.cache_figures import Figure, Settings, Subject, Tell, raise_failures
from pagemill.bench.report import Row
from pagemill.cache.entry import SharingConfig
from pagemill.cache.manager import CacheManager

OVERHEAD, WIPE, BYTES = "overhead", "wipe", "bytes"
OVERHEAD_GOAL = 0.01
BYTES_GOAL = 1 / 1.85

_CALLS = (
    "advance", "can_open", "can_resize", "close", "commit", "moved", "moves", "open", "publish_tail", "resize",
)  # fmt: skip
_WIPED_BLOCKS = (1, 16, 256)


@dataclass(slots=True)
class Counter:
    """CPU seconds of this thread inside the cache's calls. Mutated by `CountedCache`."""

    seconds: float = 0.0
    num_calls: int = 0
    depth: int = 0
    by_call: dict[str, float] = field(default_factory=dict)


class CountedCache(CacheManager):
    """A cache manager whose calls are timed from outside."""

    __slots__ = ("counter",)

    def __init__(self, num_blocks: int, block_size: int, sharing: SharingConfig | None) -> None:
        super().__init__(num_blocks, block_size, "paged", sharing)
        self.counter = Counter()


def _counted(name: str) -> Callable[..., Any]:
    call = getattr(CacheManager, name)

    def timed(self: CountedCache, *args: Any, **options: Any) -> Any:
        counter = self.counter
        if counter.depth:
            return call(self, *args, **options)
        counter.depth = 1
        began = time.thread_time()
        try:
            return call(self, *args, **options)
        finally:
            spent = time.thread_time() - began
            counter.seconds += spent
            counter.by_call[name] = counter.by_call.get(name, 0.0) + spent
            counter.num_calls += 1
            counter.depth = 0

    return timed


for _name in _CALLS:
    setattr(CountedCache, _name, _counted(_name))


class MovesApart:
    """The model's executor, its moves timed by themselves. Mutated by `run`."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.cpu_s = 0.0
        self.num_wiped = 0

    def run(self, plan: StepPlan) -> StepResult:
        """As the executor does."""
        if plan.moves:
            began = time.process_time()
            self._inner.run(StepPlan((), plan.moves))
            self.cpu_s += time.process_time() - began
            self.num_wiped += len(plan.moves.wipes)
            plan = plan._replace(moves=Moves())
        result: StepResult = self._inner.run(plan)
        return result

    def resize(self, num_blocks: int) -> None:
        """As the executor does."""
        self._inner.resize(num_blocks)


@dataclass(frozen=True, slots=True)
class _Cost:
    cpu_s: float
    cache_s: float
    wipe_s: float
    num_wiped: int
    by_call: dict[str, float]


def measure_overhead(subject: Subject, settings: Settings, tell: Tell) -> list[Figure]:
    """Distinct prompts through a cache that is too small to keep them, with sharing and without, in turns."""
    count, num_prompt = settings.size(48, 24), settings.size(512, 64)
    num_answer = settings.size(64, 8)
    costs: dict[bool, list[_Cost]] = {True: [], False: []}
    for index in range(min(settings.num_runs, 3)):
        for sharing in (True, False):
            tell(f"cost where nothing is shared, sharing {'on' if sharing else 'off'}: run {index + 1}")
            costs[sharing].append(_run_distinct(subject, count, num_prompt, num_answer, sharing=sharing))
    work = f"{count} distinct prompts of {num_prompt}, {num_answer} out, 8 at a time"
    on, off = costs[True], costs[False]
    calls = max(on, key=lambda each: each.cache_s).by_call
    return [
        Figure(
            OVERHEAD,
            Row(work, "prefix cache, of CPU time", "share", tuple(each.cache_s / each.cpu_s for each in on)),
            at_most=OVERHEAD_GOAL if not settings.quick else None,
            more={"by_call_s": {name: round(spent, 6) for name, spent in sorted(calls.items())}},
        ),
        Figure(OVERHEAD, Row(work, "blocks alone, of CPU time", "share", tuple(e.cache_s / e.cpu_s for e in off))),
        Figure(OVERHEAD, Row(work, "wiping, of CPU time", "share", tuple(each.wipe_s / each.cpu_s for each in on))),
        Figure(OVERHEAD, Row(work, "blocks wiped", "blocks", tuple(float(each.num_wiped) for each in on))),
    ]


def _run_distinct(subject: Subject, count: int, num_prompt: int, num_answer: int, *, sharing: bool) -> _Cost:
    at_once = 8
    managers: list[CountedCache] = []
    executor = MovesApart(subject.built.executor)

    def make(num_blocks: int) -> CacheManager:
        shared = subject.sharing() if sharing else None
        managers.append(CountedCache(num_blocks, subject.built.config.block_size, shared))
        return managers[-1]

    engine = subject.engine(
        2 * at_once * (num_prompt + num_answer),
        max_num_seqs=at_once,
        max_num_batched_tokens=subject.built.config.max_num_batched_tokens,
        cache=make,
        executor=executor,
    )
    params = SamplingParams(temperature=0, max_tokens=num_answer, ignore_eos=True, seed=0)
    prompts = [subject.prompt(num_prompt) for _ in range(count)]
    began = time.process_time()
    for index, prompt in enumerate(prompts):
        engine.add_request(f"distinct {index}", prompt, params)
    while engine.has_unfinished:
        raise_failures(engine.step())
    cpu_s = time.process_time() - began
    counter = managers[0].counter
    return _Cost(cpu_s, counter.seconds, executor.cpu_s, executor.num_wiped, counter.by_call)


def measure_wipe(subject: Subject, settings: Settings, tell: Tell) -> list[Figure]:
    """Time to wipe so many blocks at once, as a step does before it computes."""
    tell("wiping")
    most = max(_WIPED_BLOCKS)
    block_bytes = subject.built.kv_spec.block_bytes
    subject.engine(most * subject.built.config.block_size, max_num_seqs=1, max_num_batched_tokens=16)
    found = []
    for count in _WIPED_BLOCKS:
        moves = StepPlan((), Moves(tuple(range(count))))
        seconds = []
        for _ in range(4 * settings.num_runs + 1):
            began = subject.clock.now()
            subject.built.executor.run(moves)
            seconds.append(subject.clock.now() - began)
        row = Row(f"wipe {count} blocks of {block_bytes:,} bytes", "per block", "us", _per(seconds[1:], count))
        found.append(Figure(WIPE, row, more={"bytes_per_s": count * block_bytes / min(seconds[1:])}))
    return found


def _per(seconds: list[float], count: int) -> tuple[float, ...]:
    return tuple(1e6 * each / count for each in seconds)


def measure_bytes(subject: Subject, settings: Settings, tell: Tell) -> list[Figure]:
    """What a token position takes in memory, padding and scales included, for each codec, beside f16."""
    spec = subject.built.kv_spec
    plain = replace(spec, codec="f16").bytes_per_token
    found = []
    for codec in dict.fromkeys((spec.codec, "int8", "bf16", "f32")):
        each = replace(spec, codec=codec)
        work = f"bytes of a token position, {subject.built.spec.name}"
        found.append(Figure(BYTES, Row(work, codec, "bytes", (float(each.bytes_per_token),))))
        goal = BYTES_GOAL if codec == "int8" and not settings.quick else None
        ratio = each.bytes_per_token / plain
        found.append(Figure(BYTES, Row(work, f"{codec} ÷ f16", "ratio", (ratio,)), at_most=goal))
    return found
